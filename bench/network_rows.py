"""Networks timed beside one another → their rows: speed, cost, and the ratio to the fastest one without exits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rows import NetworkRow
from subjects import Checked

from eefast.measure.comparison import FLIP_MARGIN


@dataclass(frozen=True)
class Measured:
    """One way to run a network, its answers found to be right, timed in the same rounds as the others.

    shape: the fields of its row that were known before. spans: seconds per batch and mean cost, round by round.
    dtype: of the arithmetic. yardstick: whether the others may be measured against it. more: further fields of the row.
    """

    shape: Mapping[str, Any]
    checked: Checked
    spans: Sequence[tuple[float, float]]
    dtype: torch.dtype
    yardstick: bool
    more: Mapping[str, Any]


def fastest(measured: Sequence[Measured]) -> Measured | None:
    """The yardstick with the least median time."""
    yardsticks = [one for one in measured if one.yardstick]
    return min(yardsticks, key=lambda one: statistics.median(s for s, _ in one.spans), default=None)


def network_rows(measured: Sequence[Measured]) -> list[NetworkRow]:
    best = fastest(measured)
    return [
        NetworkRow(
            **one.shape,
            checked=True,
            **summary(one.shape["batch_size"], one.spans, None if best is None else best.spans),
            best_static=None if best is None else best.shape["provider"],
            exits=one.checked.exits,
            flips=one.checked.flips,
            flip_margin=FLIP_MARGIN[one.dtype],
            **one.more,
        )
        for one in measured
    ]


def summary(
    batch_size: int, spans: Sequence[tuple[float, float]], best: Sequence[tuple[float, float]] | None
) -> dict[str, Any]:
    """Speed, cost and realised ratio for a `NetworkRow`.

    spans: seconds per batch and mean cost, round by round; best: those of the best static way in the same rounds.
    """
    speeds = torch.tensor([batch_size / s for s, _ in spans], dtype=torch.float64)
    ratios = [] if best is None else [c * b / s for (s, c), (b, _) in zip(spans, best, strict=True)]
    return {
        "images_per_s": tuple(speeds.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()),
        "mean_cost": statistics.mean(c for _, c in spans),
        "realised_ratio": statistics.median(ratios) if ratios else None,
    }
