"""Measure how the resident engine should compute each section of a network; check how exact that is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from .layers import Lowered
from .packing import PackedWeights, ResidentProgram, program

WINOGRAD_BOUND = 3e-5
"""Largest difference of Winograd's logits from those of direct convolution ÷ largest logit; beyond it, direct runs."""

ALGORITHMS, GROUPS = (0, 2, 4), (1, 4, 8)
IMAGES, ROUNDS, SECONDS = 8, 3, 1.0
# Larger groups must pay: a lone sample never fills one.
GROUP_GAIN = 0.93

Choice = tuple[tuple[int, ...], tuple[int, ...]]
_choices: dict[Any, Choice] = {}


def tune(net: EarlyExitNet, lowered: Lowered, bfloat16: bool, images: Tensor) -> tuple[ResidentProgram, str]:
    """The program with the fastest algorithm and group size for every section, and a note on Winograd's error.

    images: [N, C, H, W] float32, to measure on. What was found for a network of the same geometry stays.
    """
    direct_only = bfloat16 or _forced() == "direct"
    key = lowered.geometry, bfloat16, direct_only, ops.instruction_set()
    known: PackedWeights = {}

    @cache
    def packed(algorithms: tuple[int, ...]) -> ResidentProgram:
        return program(lowered, algorithms, (1,) * len(algorithms), bfloat16, known)

    def pack(algorithms: tuple[int, ...], groups: tuple[int, ...]) -> ResidentProgram:
        return replace(packed(algorithms), groups=torch.tensor(groups), group_sizes=groups)

    if key not in _choices:
        _choices[key] = _fastest(net, len(lowered.sizes), (0,) if direct_only else ALGORITHMS, pack, images)
    algorithms, groups = _choices[key]
    if not any(algorithms):
        return pack(algorithms, groups), ""
    exact = all_logits(net, pack((0,) * len(groups), groups), images)

    def error(chosen: tuple[int, ...]) -> float:
        logits = all_logits(net, pack(chosen, groups), images)
        return float((logits - exact).abs().max() / exact.abs().max().clamp_min(1e-30))

    while not error(algorithms) <= WINOGRAD_BOUND and any(algorithms):
        alone = [error(tuple(a if i == s else 0 for i, a in enumerate(algorithms))) for s in range(len(algorithms))]
        worst = max((s for s, a in enumerate(algorithms) if a), key=lambda s: (alone[s], algorithms[s]))
        algorithms = tuple({4: 2, 2: 0}[a] if s == worst else a for s, a in enumerate(algorithms))
    note = f"Winograd's logits differ from direct convolution's by {error(algorithms):.1g} of the largest, "
    return pack(algorithms, groups), note + f"at most {WINOGRAD_BOUND:.0e} is allowed"


def _forced() -> str:
    value = os.environ.get("EEFAST_CONV", "")
    if value not in ("", "direct"):
        raise ValueError(f"EEFAST_CONV={value!r} is unknown; set it to direct or leave it out")
    return value


def thresholds(net: EarlyExitNet, exit_index: int) -> Tensor:
    """[n] float32 thresholds at which everybody leaves at this exit."""
    always, never = (-torch.inf, torch.inf) if net.criterion.comparison == ">" else (torch.inf, -torch.inf)
    return torch.tensor([always if i == exit_index else never for i in range(net.num_exits)])


def example(net: EarlyExitNet, images: Tensor | None) -> Tensor:
    """[IMAGES, C, H, W] float32: the first of `images`, repeated where there are too few; else normal noise."""
    if images is None or len(images) == 0:
        return torch.randn(IMAGES, *net.input_shape, generator=torch.Generator().manual_seed(0))
    return images.float()[torch.arange(IMAGES) % len(images)].contiguous()


def fastest_of(ways: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each way, the least over rounds in which all take turns."""
    found = [float("inf")] * len(ways)
    for _ in range(rounds):
        for i, way in enumerate(ways):
            begin = time.perf_counter()
            way()
            found[i] = min(found[i], time.perf_counter() - begin)
    return found


def _fastest(
    net: EarlyExitNet,
    sections: int,
    algorithms: tuple[int, ...],
    pack: Callable[[tuple[int, ...], tuple[int, ...]], ResidentProgram],
    images: Tensor,
) -> Choice:
    choices = [(a, g) for a in algorithms for g in GROUPS]
    best = torch.full((len(choices), sections), torch.inf, dtype=torch.float64)
    to_the_end, begin = thresholds(net, net.num_exits), time.perf_counter()
    for r in range(ROUNDS):
        if r and time.perf_counter() - begin > SECONDS:
            break
        for i, (algorithm, group) in enumerate(choices):
            seconds = torch.zeros(sections, dtype=torch.float64)
            _run(net, pack((algorithm,) * sections, (group,) * sections), images, to_the_end, seconds)
            best[i] = torch.minimum(best[i], seconds)
    found = []
    for own in best.T.tolist():
        least = min(own)
        small = min((g, s) for (_, g), s in zip(choices, own, strict=True) if s * GROUP_GAIN <= least)[0]
        found.append(min((s, c) for c, s in zip(choices, own, strict=True) if c[1] == small)[1])
    chosen, groups = zip(*found, strict=True)
    return chosen, groups


def all_logits(net: EarlyExitNet, p: ResidentProgram, images: Tensor) -> Tensor:
    """[exits, N, K]: what every exit says."""
    return torch.stack([_run(net, p, images, thresholds(net, i)) for i in range(net.num_exits + 1)])


def _run(
    net: EarlyExitNet, p: ResidentProgram, images: Tensor, limits: Tensor, seconds: Tensor | None = None
) -> Tensor:
    tables = p.steps, p.maps, p.groups, p.weights, p.packed, limits
    threads = 0 if seconds is None else 1
    rule = net.criterion.name, net.num_classes
    return ops.resident_forward.run(images, *tables, *rule, p.bfloat16, threads, seconds)[0]
