"""Outputs of all exits on held-out data → thresholds within a bound on accuracy, on cost, or on both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan
from pathlib import Path

import torch
from torch import Tensor

from ..criteria import CRITERIA
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system import files
from ..system.strict_json import json_text
from . import assured, search
from .candidates import Candidate, candidate_of
from .cuts import Cuts
from .evaluation import exit_quality
from .outputs import check_labels
from .scaling import fold_scaling

THRESHOLDS_FILE = "thresholds.json"


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and their accuracy and cost on the data that they were chosen on.

    criterion: name in `eefast.criteria`.
    thresholds: one per early exit.
    accuracy, cost: share of right answers and mean cost, both 0 … 1.
    assurance: the probability with which the bounds hold on new data; None where they were only kept on this data.
    judged_by: with an assurance, the number of samples that judged, others than those that the thresholds come from.
    """

    criterion: str
    thresholds: tuple[float, ...]
    accuracy: float
    cost: float
    assurance: float | None = None
    judged_by: int | None = None


def calibrate(
    outputs: Sequence[ExitOutput],
    labels: Tensor | None,
    cost: Tensor,
    criterion: str = "learned",
    *,
    min_accuracy: float | None = None,
    max_accuracy_drop: float | None = None,
    max_cost: float | None = None,
    assurance: float | None = None,
) -> Calibration:
    """The thresholds of lowest cost within a bound on accuracy, or the most accurate ones with at most `max_cost`.

    outputs, labels: of n + 1 exits on held-out data, see `outputs.collect`; labels None: the final exit's answers are
        taken for right, so that accuracy is the share of samples that get the same answer as without early exits.
    cost: [n + 1], `EarlyExitNet.cost` or `path_cost`.
    criterion: name in `eefast.criteria`.
    min_accuracy, max_accuracy_drop: a bound on accuracy, or on the final exit's accuracy less it; one of them, 0 … 1.
    max_cost: 0 … 1. With a bound on accuracy too: the thresholds of lowest cost, as far as they keep both.
    assurance: probability, above 0 and below 1, with which the bounds hold on new data; None: on this data only.

    What is guaranteed without an assurance: a threshold matters only by which samples exit, so every exit has at most
    N + 1 distinguishable cuts. With few combinations of them (one early exit: always; two: up to 2,800 samples; three:
    190; four: 40) all are tried and the answer is the optimum. With more, the bound still holds and the answer is a
    local optimum: no change of one threshold improves it, nor does one of two at a time among about 150 cuts of each.
    The search starts from the optima without the bound at many prices of cost (`pareto_front`), and with fewer than
    50,000 samples again from random changes of its answer, the same ones each time. 50,000 samples and eight exits take
    some 5 s on two cores. A threshold is half-way between two confidences that occurred, so none of them ties with it.

    With one: drawn samples and new ones of the same population break a bound with probability 1 - assurance at most,
    over all draws of N samples. Nothing is promised for data that has shifted since. Every criterion that is calibrated
    has its own chance to be wrong. How: see `assured`; in short, thresholds come from three samples of ten, and the
    others judge. The cost is somewhat higher, the fewer samples the more.

    Raises `ValueError` for no bound, two on accuracy, an assurance outside 0 … 1 or on fewer than 100 samples, and if
    nothing found keeps the bound, with the nearest that was found and with an assurance about how many samples would
    have been enough.
    """
    bounds = {"min_accuracy": min_accuracy, "max_accuracy_drop": max_accuracy_drop, "max_cost": max_cost}
    given = {name: value for name, value in bounds.items() if value is not None}
    check_bounds(given, assurance)
    labels = outputs[-1].logits.argmax(dim=1) if labels is None else labels
    check_labels(labels, len(outputs[0].logits))
    if assurance is not None:
        found = assured.find_thresholds(outputs, labels, cost, criterion, given, assurance)
        return Calibration(criterion, found.thresholds, found.accuracy, found.cost, assurance, found.judged_by)
    if max_accuracy_drop is not None:
        min_accuracy = exit_quality(outputs[-1:], labels)[0].accuracy - max_accuracy_drop
    cuts = Cuts(outputs, labels, cost, criterion)
    n = len(labels)

    def excess(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        return min_accuracy - accuracy if min_accuracy is not None else mean_cost - max_cost

    def within_bound(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        # Ties go to the lower cost, or to the higher accuracy: accuracies differ by at least 1 / n.
        gain = 1e-9 * accuracy - mean_cost if min_accuracy is not None else accuracy - mean_cost / (4 * n)
        # Both are within a few units of 0, so everything feasible is above everything infeasible.
        return gain.where(excess(totals) <= 1e-12, -100 - excess(totals))

    best = search.find_best(cuts, within_bound)
    totals = cuts.totals(best)
    chosen = _calibration(cuts, criterion, best, totals)
    # Looser than the search, whose running sums differ from the sum over all in the last bits.
    kept = float(excess(totals)) <= 1e-9 and (max_cost is None or chosen.cost <= max_cost + 1e-9)
    if not kept:
        bound = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ValueError(
            f"{bound} cannot be kept; the nearest is accuracy {chosen.accuracy:.4f} at mean cost {chosen.cost:.4f}"
        )
    return chosen


def check_bounds(bounds: Mapping[str, float], assurance: float | None) -> None:
    """`ValueError` without bounds, with two on accuracy, and for a drop or an assurance out of range."""
    given = ", ".join(f"{name}={value}" for name, value in bounds.items())
    if not bounds:
        raise ValueError("no bound is given; give min_accuracy, max_accuracy_drop or max_cost")
    if {"min_accuracy", "max_accuracy_drop"} <= bounds.keys():
        raise ValueError(f"{given}: both bound the accuracy; give one of them")
    for name, value in bounds.items():
        if isnan(value) or (name == "max_accuracy_drop" and not 0 <= value <= 1):
            raise ValueError(f"{name}={value} must be in 0 … 1")
    if assurance is not None and not 0 < assurance < 1:
        raise ValueError(f"assurance={assurance} must be above 0 and below 1, such as 0.9; None for no assurance")


def pareto_front(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str = "learned"
) -> tuple[Calibration, ...]:
    """Thresholds of which none has lower cost and no lower accuracy than another, by ascending cost.

    Arguments as `calibrate`. Where that tries all combinations this is the whole front; elsewhere its convex hull, as
    far as a search that changes one threshold at a time finds it: optima of accuracy - price × mean cost for many
    prices.
    """
    cuts = Cuts(outputs, labels, cost, criterion)
    totals, front = search.find_front(cuts)
    return tuple(_calibration(cuts, criterion, *point) for point in zip(front, totals.T, strict=True))


def _calibration(cuts: Cuts, criterion: str, picks: Sequence[int], totals: Tensor) -> Calibration:
    accuracy, mean_cost = (totals / cuts.num_samples).tolist()
    return Calibration(criterion, cuts.thresholds_of(picks), accuracy, mean_cost)


def least_images(max_accuracy_drop: float | None = None, assurance: float | None = None) -> int:
    """The number of samples that thresholds should at least be chosen on.

    100, of which one is a hundredth of the accuracy. With a bound on the drop of accuracy enough that one sample is no
    more than that drop: 200 for 0.005. Drops below 0.001 ask for 1,000. With an assurance of that bound enough to show
    that it is kept by exits that are never wrong: 730 for 0.005 and 0.9, and in practice a few thousand.
    """
    if max_accuracy_drop is None:
        return 100
    drop = max(max_accuracy_drop, 0.001)
    least = max(100, ceil(1 / drop))
    return least if assurance is None else max(least, assured.least_samples({"max_accuracy_drop": drop}, assurance))


def saved_criterion(net: EarlyExitNet, chosen: Mapping[str, Calibration]) -> str:
    """The criterion that `save_thresholds` saves the network with."""
    return net.criterion.name if net.criterion.name in chosen else next(iter(chosen))


def save_thresholds(
    net: EarlyExitNet,
    folder: str | Path,
    chosen: Mapping[str, Calibration],
    profiles: Mapping[str, Calibration] | None = None,
    candidates: Mapping[str, Candidate] | None = None,
) -> EarlyExitNet:
    """Write the network with its new thresholds to `folder`, and those of all criteria in `chosen` to thresholds.json.

    profiles: of `saved_criterion`, added to those that the network has of it.
    candidates: the criteria of `chosen`, where some were given numbers. That of `saved_criterion` is saved with them,
        its scaling folded into the heads; thresholds.json has only what holds for the network so saved.

    The network keeps its criterion where that is among `chosen`, else it takes the first one there. The folder's files
    are replaced together, or not at all. Raises as `EarlyExitNet.save` does.
    """
    name = saved_criterion(net, chosen)
    thresholds = chosen[name].thresholds
    candidate = candidate_of(net, name) if candidates is None else candidates[name]
    if candidate.criterion != net.exit_rule:
        net = net.with_criterion(candidate.criterion)
    if candidate.scaling is not None:
        fold_scaling(net, candidate.scaling)
    if net.config is not None and "float_thresholds" in net.config:  # a quantised network has its own from now on
        net.config = {**net.config, "float_thresholds": {}}
    net.thresholds.copy_(torch.tensor(thresholds))
    if profiles:
        net.profiles = {**net.profiles, **profiles}
    kept = [name] if candidate.scaling is not None else [n for n in chosen if n == name or n in CRITERIA]
    found = {name: list(chosen[name].thresholds) for name in kept}
    with files.together():
        net.save(folder)
        files.write(Path(folder) / THRESHOLDS_FILE, json_text(found))
    return net
