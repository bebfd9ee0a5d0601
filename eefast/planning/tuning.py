"""Measure how the resident engine should compute each section: lowered network → program, checked against direct."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..engines.program import ResidentProgram
from ..model import EarlyExitNet
from . import probe
from .layers import Lowered
from .packing import PackedWeights, program

WINOGRAD_BOUND = 3e-5
"""Largest difference of Winograd's logits from those of direct convolution ÷ largest logit; beyond it, direct runs."""

ALGORITHMS, GROUPS, GROUP_OF_LARGE = (0, 2, 4), (1, 4, 8), 4
NEXT_SMALLER = {4: 2, 2: 0}
ROUNDS, SECONDS = 3, 1.0
FEW, FEWER = 4, 2
"""Images of large networks that are timed, and whose logits are compared."""

# Larger groups must pay: a lone sample never fills one.
GROUP_GAIN = 0.93

Choice = tuple[tuple[int, ...], tuple[int, ...]]
"""Per section, the side of the Winograd tiles (0: direct) and the samples that go together."""

Pack = Callable[[tuple[int, ...], tuple[int, ...]], ResidentProgram]

choices: dict[Any, Choice] = {}
"""The fastest choice for each geometry of a network; none is measured twice."""


def tuned(net: EarlyExitNet, lowered: Lowered, bfloat16: bool, images: Tensor) -> tuple[ResidentProgram, str]:
    """The program with the fastest algorithm and group size for every section, and a note on Winograd's error.

    images: [N, C, H, W] float32, to measure on. The algorithms of a quantised network are its own and stay.
    """
    able = {layer.section for layer in lowered.layers if layer.allows_winograd}
    direct_only = bfloat16 or _forced() == "direct" or lowered.image is not None or not able
    images = images[:FEW] if probe.is_large(net) else images
    key = lowered.geometry, bfloat16, direct_only, ops.instruction_set(), ops.int8_instruction_set()
    known: PackedWeights = {}

    @cache
    def packed(algorithms: tuple[int, ...]) -> ResidentProgram:
        return program(lowered, algorithms, (1,) * len(algorithms), bfloat16, known)

    def pack(algorithms: tuple[int, ...], groups: tuple[int, ...]) -> ResidentProgram:
        return replace(packed(algorithms), groups=torch.tensor(groups), group_sizes=groups)

    if key not in choices:
        measure = fastest_of_large if probe.is_large(net) else fastest
        choices[key] = measure(net, len(lowered.sizes), (0,) if direct_only else ALGORITHMS, pack, images)
    algorithms, groups = choices[key]
    algorithms = tuple(a if section in able else 0 for section, a in enumerate(algorithms))
    if not any(algorithms):
        return pack(algorithms, groups), ""
    compared = images[:FEWER] if probe.is_large(net) else images
    exact = all_logits(net, pack((0,) * len(groups), groups), compared)

    @cache
    def error(chosen: tuple[int, ...]) -> float:
        logits = all_logits(net, pack(chosen, groups), compared)
        return float((logits - exact).abs().max() / exact.abs().max().clamp_min(1e-30))

    while not error(algorithms) <= WINOGRAD_BOUND and any(algorithms):
        alone = [error(tuple(a if i == s else 0 for i, a in enumerate(algorithms))) for s in range(len(algorithms))]
        worst = max((s for s, a in enumerate(algorithms) if a), key=lambda s: (alone[s], algorithms[s]))
        algorithms = tuple(NEXT_SMALLER[a] if s == worst else a for s, a in enumerate(algorithms))
    note = f"Winograd's logits differ from direct convolution's by {error(algorithms):.1g} of the largest, "
    return pack(algorithms, groups), note + f"at most {WINOGRAD_BOUND:.0e} is allowed"


def _forced() -> str:
    value = os.environ.get("EEFAST_CONV", "")
    if value not in ("", "direct"):
        raise ValueError(f"EEFAST_CONV={value!r} is unknown; set it to direct or leave it out")
    return value


def fastest(net: EarlyExitNet, sections: int, algorithms: tuple[int, ...], pack: Pack, images: Tensor) -> Choice:
    """The fastest algorithm for every section, with the smallest group that is nearly as fast as the fastest."""
    candidates = [(a, g) for a in algorithms for g in GROUPS]
    best = torch.full((len(candidates), sections), torch.inf, dtype=torch.float64)
    begin = time.perf_counter()
    for r in range(ROUNDS):
        if r and time.perf_counter() - begin > SECONDS:
            break
        for i, (algorithm, group) in enumerate(candidates):
            seconds = _seconds(net, pack((algorithm,) * sections, (group,) * sections), images, sections)
            best[i] = torch.minimum(best[i], seconds)
    found = []
    for measured in best.T.tolist():
        least = min(measured)
        small = min((g, s) for (_, g), s in zip(candidates, measured, strict=True) if s * GROUP_GAIN <= least)[0]
        found.append(min((s, c) for c, s in zip(candidates, measured, strict=True) if c[1] == small)[1])
    chosen, groups = zip(*found, strict=True)
    return chosen, groups


def fastest_of_large(
    net: EarlyExitNet, sections: int, algorithms: tuple[int, ...], pack: Pack, images: Tensor
) -> Choice:
    """As `fastest`, in one round: samples alone only by the algorithms that are the fastest ones in groups."""
    groups = (GROUP_OF_LARGE,) * sections
    together = torch.stack([_seconds(net, pack((a,) * sections, groups), images, sections) for a in algorithms])
    least, fastest_ones = together.min(0)
    chosen = tuple(algorithms[i] for i in fastest_ones.tolist())
    alone = _seconds(net, pack(chosen, (1,) * sections), images, sections)
    return chosen, tuple(GROUP_OF_LARGE if pays else 1 for pays in (least < alone * GROUP_GAIN).tolist())


def _seconds(net: EarlyExitNet, candidate: ResidentProgram, images: Tensor, sections: int) -> Tensor:
    """[sections] float64: of images that all go to the final exit."""
    seconds = torch.zeros(sections, dtype=torch.float64)
    run(net, candidate, images, probe.thresholds(net, net.num_exits), seconds)
    return seconds


def all_logits(net: EarlyExitNet, candidate: ResidentProgram, images: Tensor) -> Tensor:
    """[exits, N, K]: what every exit says."""
    return torch.stack([run(net, candidate, images, probe.thresholds(net, i)) for i in range(net.num_exits + 1)])


def run(
    net: EarlyExitNet, candidate: ResidentProgram, images: Tensor, thresholds: Tensor, seconds: Tensor | None = None
) -> Tensor:
    """[N, K] logits; seconds: [sections] float64, to which the time spent in each section is added."""
    threads = 0 if seconds is None else 1
    return candidate.run(images, thresholds, probe.criterion(net), net.num_classes, threads, seconds)[0]
