"""bfloat16 asked for on the CPU → the program in bfloat16 or, where that is slow, in float32: whichever is faster."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from .. import ops
from ..engines.program import ResidentProgram
from ..model import EarlyExitNet
from . import probe, tuning
from .layers import Lowered

speeds: dict[Any, tuple[float, float]] = {}
"""Seconds in bfloat16 and in float32, for each geometry of a network; none is measured twice."""


def tuned_for_bfloat16(net: EarlyExitNet, lowered: Lowered, images: Tensor) -> tuple[ResidentProgram, tuple[str, ...]]:
    """The program, and notes for the plan that say in which arithmetic it computes and why.

    Both take images in float32 or bfloat16 and return float32 logits, so that nothing else changes; float32 is the more
    exact. images: [N, C, H, W] float32, to measure on.
    """
    exact, note = tuning.tuned(net, lowered, False, images)
    notes = (note,) if note else ()
    instructions = ops.instruction_set()
    if instructions != "avx512_bf16":
        return exact, (f"computed in float32, since the instruction set {instructions} has no bfloat16", *notes)
    rounded, _ = tuning.tuned(net, lowered, True, images)
    key = lowered.geometry, instructions
    if key not in speeds:
        to_the_end = probe.thresholds(net, net.num_exits)
        first, second = probe.fastest_of([partial(tuning.run, net, p, images, to_the_end) for p in (rounded, exact)])
        speeds[key] = first, second
    in_bfloat16, in_float32 = (1e3 * seconds for seconds in speeds[key])
    times = f"{len(images)} images: {in_bfloat16:.1f} ms in bfloat16, {in_float32:.1f} in float32"
    if in_bfloat16 <= in_float32:
        return rounded, (f"bfloat16 is {in_float32 / in_bfloat16:.1f}× as fast as float32 here ({times})",)
    faster = f"computed in float32, which is {in_bfloat16 / in_float32:.1f}× as fast as bfloat16 here ({times})"
    return exact, (faster, *notes)
