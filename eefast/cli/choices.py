"""Held-out images and a budget → the criterion and thresholds that a network is measured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..system.progress import Progress
from .budget import choose_thresholds
from .held_out import HeldOutImages

if TYPE_CHECKING:
    from ..measure.assessment import Assessment, InInt8
    from ..model import EarlyExitNet
    from ..thresholds.calibration import Calibration

# Thresholds of the curve of accuracy against speed: how many, and how far below the final exit's accuracy at most.
CURVE_POINTS, CURVE_DROP = 6, 0.03
# Held-out images from which the ranges of maps in INT8 are taken.
RANGE_IMAGES = 512


@dataclass(frozen=True)
class Choice:
    """The network with the criterion and thresholds that were chosen.

    chosen: the best thresholds by criterion; impossible: criterion → why it has none; both empty where nothing was to
    be chosen. others: further thresholds of the network's criterion, by ascending cost.
    """

    net: EarlyExitNet
    chosen: Mapping[str, Calibration] = field(default_factory=dict)
    impossible: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[Sequence[float]] = ()


def choose(
    net: EarlyExitNet,
    aside: HeldOutImages,
    names: Sequence[str],
    kind: str,
    value: float,
    cache: Path | None,
    batch_size: int,
    progress: Progress,
) -> Choice:
    """names: of criteria; kind, value: the budget; batch_size: of images that go through all exits together."""
    from ..thresholds import calibration, evaluation
    from ..thresholds.candidates import candidate_of

    try:
        outputs, labels = aside.outputs(net, cache, batch_size, progress)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; or keep the network's thresholds: --own-thresholds") from error
    candidates = {name: candidate_of(net, name) for name in names}
    chosen, impossible = choose_thresholds(net, outputs, labels, candidates, {kind: value}, progress)
    best = best_criterion(chosen, kind)
    final = evaluation.exit_quality(outputs[-1:], labels)[0].accuracy
    front = calibration.pareto_front(candidates[best].outputs(outputs), labels, net.cost, best)
    near = [point for point in front if point.accuracy > final - CURVE_DROP]
    net = net.with_criterion(best, chosen[best].thresholds).to(net.cost.device)
    return Choice(net, chosen, impossible, [point.thresholds for point in evenly_by_cost(near, CURVE_POINTS)])


def in_int8(choice: Choice, aside: HeldOutImages, batch_size: int, progress: Progress) -> InInt8:
    """The chosen network in INT8: ranges from the first held-out images, thresholds at the same mean cost on all."""
    import torch

    from ..measure.assessment import InInt8
    from ..quantization.post_training import quantize
    from ..thresholds import calibration
    from ..thresholds.outputs import answered

    images, name = aside.first(choice.net, RANGE_IMAGES), choice.net.criterion.name
    progress("quantising", 0, 1)
    made = quantize(choice.net, images)
    progress("quantising", 1, 1)
    outputs, labels = aside.outputs(made, None, batch_size, progress)
    seen = answered(outputs, made)
    found = calibration.calibrate(seen, labels, made.cost, name, max_cost=choice.chosen[name].cost)
    made.thresholds.copy_(torch.tensor(found.thresholds))
    return InInt8(made, images)


def best_criterion(chosen: Mapping[str, Calibration], kind: str) -> str:
    """The criterion of lowest cost for a budget of accuracy, of highest accuracy for a budget of cost."""
    if kind == "max_cost":
        return max(chosen, key=lambda name: (chosen[name].accuracy, -chosen[name].cost))
    return min(chosen, key=lambda name: (chosen[name].cost, -chosen[name].accuracy))


def evenly_by_cost(front: Sequence[Calibration], most: int) -> list[Calibration]:
    """At most `most` points with costs spaced evenly, first and last included; front: by ascending cost."""
    steps = [front[0].cost + i / (most - 1) * (front[-1].cost - front[0].cost) for i in range(most)] if front else []
    nearest = [min(front, key=lambda point: abs(point.cost - step)) for step in steps]
    return list(dict.fromkeys(nearest))


def excess(found: Assessment, kind: str, value: float) -> str:
    """A sentence where the budget, kept on the held-out images, is not kept on the test images; "" where it is."""
    drop = found.plain_accuracy - found.early.accuracy
    measured, kept = {
        "max_accuracy_drop": (drop, drop <= value + 1e-9),
        "min_accuracy": (found.early.accuracy, found.early.accuracy >= value - 1e-9),
        "max_cost": (found.early.mean_cost, found.early.mean_cost <= value + 1e-9),
    }[kind]
    digits = 4 if f"{measured:.4f}" != f"{value:.4f}" else 7  # as many as tell them apart
    return (
        "" if kept else f"the budget is not kept on the test images: {kind} {measured:.{digits}f} instead of {value:g}"
    )
