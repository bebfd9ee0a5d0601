"""Outputs of all exits → accuracy and mean cost at one threshold for all of them, for many thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

from torch import Tensor

from .. import criteria
from ..result import ExitOutput
from .outputs import outcome

# T-RecX (Ghanathe & Wilton 2023) draws its benefit curve at 0.00, 0.01 … 1.00.
POINTS = 101


@dataclass(frozen=True)
class BenefitPoint:
    """The threshold of every early exit, and accuracy and mean cost with it."""

    threshold: float
    accuracy: float
    cost: float


def benefit_curve(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str, points: int = POINTS
) -> tuple[BenefitPoint, ...]:
    """From the threshold 0 to 1, of the entropy to its largest value log K, in equal steps.

    outputs: of n + 1 exits for N samples; labels: [N] int64; cost: [n + 1].
    Raises `ValueError` for fewer than 2 points.
    """
    if points < 2:
        raise ValueError(f"points={points} must be at least 2")
    classes = outputs[0].logits.shape[1]
    top = log(classes) if criteria.get(criterion).comparison == "<" else 1.0
    found = []
    for step in range(points):
        threshold = top * step / (points - 1)
        found.append(
            BenefitPoint(threshold, *outcome(outputs, labels, cost, criterion, [threshold] * (len(outputs) - 1)))
        )
    return tuple(found)
