"""EENets by name: a ResNet trunk cut after chosen blocks, a head at every cut."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import nn

from ..carrying import carry_on
from ..cost import macs
from ..heads import ExitHead, kinds_of, shortest
from ..model import EarlyExitNet
from . import eenet8
from .placement import place
from .resnets import DEPTHS, initialise, trunk

ROWS = "-1d"
SMALLEST = "resnet8"
"""ResNet-8 cut like the others, since EENet-8 is a network of its authors' own."""


def names() -> list[str]:
    """The names that `eenet` takes: "eenet8" … "eenet152" and "resnet8"."""
    return ["eenet8", *(f"eenet{depth}" for depth in DEPTHS), SMALLEST, "eenet14"]


def eenet(
    name: str,
    num_exits: int = 2,
    placement: str | Sequence[int] = "fine",
    head: str | Sequence[str] = "pool",
    num_classes: int = 10,
    input_shape: Sequence[int] = (3, 32, 32),
    *,
    criterion: str = "learned",
    thresholds: Sequence[float] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    filters: int = 2,
    carry: str | None = None,
    device: torch.device | str | None = None,
) -> EarlyExitNet:
    """The early-exit network called `name`, "eenet8" … "eenet152" (Demir & Akbas 2024) or "resnet8", initialised.

    "eenet18-1d" … "eenet152-1d" are the same on rows [N, C, L], such as windows of sensors, with input_shape (C, L).

    num_exits: number of early exits; EENet-8 always has its two.
    placement: "fine", "pareto", "linear", "gold_ratio", or the numbers of residual blocks before each exit, 0 for one
        after the stem (their count then replaces `num_exits`); EENet-8's exits are fixed.
    head: kind of the early exits' heads, see `eefast.heads.ExitHead`; one for all, or one for each.
    input_shape: (C, H, W) of the images.
    criterion, thresholds, normalization: see `EarlyExitNet`.
    filters: channels of EENet-8's first block; the other networks ignore it.
    carry: "features": the final exit also reads the pooled features of the last early one (T-RecX), see
        `eefast.carrying`; None: its own only.
    device: where the parameters are made, torch's default without it; on "meta" they have shapes, but no memory.
    Raises `ValueError` for unknown names and for exits that do not fit, saying how many do.
    """
    rows = name.endswith(ROWS) and name != f"eenet8{ROWS}"
    if (name.removesuffix(ROWS) if rows else name) not in names():
        raise ValueError(
            f"name={name!r} is unknown; choose one of {', '.join(names())}; all but the first also with -1d"
        )
    shape_is = "(C, L)" if rows else "(C, H, W)"
    if len(input_shape) != (2 if rows else 3) or min(input_shape) < 1 or num_classes < 1:
        raise ValueError(f"input_shape={input_shape} must be {shape_is} and num_classes={num_classes} at least 1")
    with nullcontext() if device is None else torch.device(device):
        if name == "eenet8":
            if num_exits != 2:
                raise ValueError(f"num_exits={num_exits}: EENet-8 has exactly 2 early exits")
            positions: tuple[int, ...] = (1, 2)
            stages = eenet8.stages(filters, input_shape)
        else:
            positions, stages = _cut(_depth(name), num_exits, placement, num_classes, input_shape)
        shape, heads, kinds = tuple(input_shape), [], kinds_of(head, len(positions))
        for i, stage in enumerate(stages):
            _, shape = macs(stage, shape)
            heads.append(ExitHead(kinds[i] if i < len(positions) else "pool", shape, num_classes, input_shape))
        carry_on(carry, stages, heads, input_shape)
    config = {
        "kind": "eenet",
        "name": name,
        "num_exits": len(positions),
        "placement": list(positions),
        "head": shortest(kinds),
        "num_classes": num_classes,
        "input_shape": list(input_shape),
        "normalization": normalization,
        **({"filters": filters} if name == "eenet8" else {}),
        **({"carry": carry} if carry else {}),
    }
    for module in (*stages, *heads):
        initialise(module)
    return EarlyExitNet(
        stages,
        heads,
        input_shape=input_shape,
        criterion=criterion,
        thresholds=thresholds,
        normalization=normalization,
        config=config,
    )


def block_costs(name: str, num_classes: int, input_shape: Sequence[int]) -> list[float]:
    """For every residual block of the EENet called `name`, MACs up to and including it ÷ MACs of the plain network."""
    with torch.device("meta"):
        parts = trunk(_depth(name), input_shape[0], len(input_shape) == 2)
        return _costs(*parts, num_classes, input_shape)


def _depth(name: str) -> int:
    """Layers of the network called `name`, which is not EENet-8."""
    return int(name.removesuffix(ROWS).removeprefix("resnet").removeprefix("eenet"))


def _costs(
    stem: nn.Module, blocks: Sequence[nn.Module], width: int, num_classes: int, input_shape: Sequence[int]
) -> list[float]:
    total, shape = macs(stem, input_shape)
    upto = []
    for block in blocks:
        block_macs, shape = macs(block, shape)
        total += block_macs
        upto.append(total)
    plain = total + macs(ExitHead("pool", shape, num_classes, input_shape), shape)[0] - width
    return [c / plain for c in upto]


def _cut(
    depth: int, num_exits: int, placement: str | Sequence[int], num_classes: int, input_shape: Sequence[int]
) -> tuple[tuple[int, ...], list[nn.Module]]:
    """Blocks before each exit, and the stages between the cuts, the stem in the first."""
    stem, blocks, width = trunk(depth, input_shape[0], len(input_shape) == 2)
    positions = place(_costs(stem, blocks, width, num_classes, input_shape), num_exits, placement)
    layers, edges = [stem, *blocks], (0, *(position + 1 for position in positions), len(blocks) + 1)
    stages: list[nn.Module] = [nn.Sequential(*layers[lo:hi]) for lo, hi in pairwise(edges)]
    return positions, stages
