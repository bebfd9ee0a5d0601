"""Outputs of all exits and the MACs of stages and heads → the early exits that do not pay for their heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import criteria
from ..cost import StageCost, merged, path_costs
from ..result import ExitOutput
from . import assured
from .calibration import Calibration, calibrate
from .outputs import check_labels


def find_thresholds_and_exits(
    outputs: Sequence[ExitOutput],
    labels: Tensor | None,
    costs: Sequence[StageCost],
    criterion: str = "learned",
    *,
    min_accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    assurance: float | None = None,
) -> tuple[tuple[int, ...], Calibration]:
    """The early exits to leave out, and the thresholds of the others, where a head costs all samples that pass it.

    costs: of all stages and heads, `EarlyExitNet.stage_costs`; costs of the result are those of `path_costs`, heads
        included, as `max_cost` is. Other arguments and errors as of `calibrate`.

    One exit after the other is left out, the one that gains most, for as long as leaving one out lowers the cost or,
    within `max_cost` alone, raises the accuracy; one early exit stays. With an assurance only the samples that lay
    the path choose the exits, so that the others still judge.
    Raises `ValueError` for a criterion that reads the exits before, which answers otherwise where one is left out.
    """
    if criteria.get(criterion).carries:
        raise ValueError(
            f"criterion={criterion!r} reads the exits before; leave exits out by another criterion, then calibrate the "
            "network without them for this one"
        )
    bounds: dict[str, Any] = {
        "min_accuracy": min_accuracy,
        "max_accuracy_drop": max_accuracy_drop,
        "max_cost": max_cost,
    }
    labels = outputs[-1].logits.argmax(dim=1) if labels is None else labels
    check_labels(labels, len(outputs[0].logits))
    chosen_by = assured.divided(len(labels))[0] if assurance is not None else slice(None)
    seen = [ExitOutput(*(part[chosen_by] for part in out)) for out in outputs]

    def found(left_out: Sequence[int]) -> Calibration | None:
        kept, right, cost = _without(seen, costs, left_out, labels[chosen_by])
        try:
            return calibrate(kept, right, cost, criterion, **bounds)
        except ValueError:
            return None

    def value(calibration: Calibration | None) -> tuple[float, float]:
        if calibration is None:
            return -float("inf"), 0.0
        by_accuracy = min_accuracy is None and max_accuracy_drop is None
        gains = calibration.accuracy, -calibration.cost
        return gains if by_accuracy else gains[::-1]

    left_out: tuple[int, ...] = ()
    best = value(found(()))
    while len(left_out) < len(outputs) - 2:
        others = [tuple(sorted((*left_out, i))) for i in range(len(outputs) - 1) if i not in left_out]
        tried = [(value(found(other)), other) for other in others]
        top, chosen = max(tried)
        if not top > best:
            break
        best, left_out = top, chosen
    kept, right, cost = _without(outputs, costs, left_out, labels)
    return left_out, calibrate(kept, right, cost, criterion, **bounds, assurance=assurance)


def _without(
    outputs: Sequence[ExitOutput], costs: Sequence[StageCost], left_out: Sequence[int], labels: Tensor
) -> tuple[list[ExitOutput], Tensor, Tensor]:
    """Outputs, labels and costs with heads of a network without some exits."""
    kept = [out for i, out in enumerate(outputs) if i not in left_out]
    return kept, labels, path_costs(merged(costs, left_out))[1]
