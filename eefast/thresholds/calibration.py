"""Outputs of all exits on held-out data → thresholds under a lower bound on accuracy or an upper bound on cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system import files
from . import search
from .cuts import Cuts

THRESHOLDS_FILE = "thresholds.json"


@dataclass(frozen=True)
class Calibration:
    """Thresholds, and their accuracy and cost on the data that they were chosen on.

    criterion: name in `eefast.criteria`.
    thresholds: one per early exit.
    accuracy, cost: share of right answers and mean cost, both 0 … 1.
    """

    criterion: str
    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


def calibrate(
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    cost: Tensor,
    criterion: str = "learned",
    *,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
) -> Calibration:
    """The thresholds of lowest cost with at least `min_accuracy`, or the most accurate ones with at most `max_cost`.

    outputs, labels: of n + 1 exits on held-out data, see `outputs.collect`.
    cost: [n + 1], `EarlyExitNet.cost` or `path_cost`.
    criterion: name in `eefast.criteria`.
    min_accuracy, max_cost: exactly one of them, 0 … 1.

    What is guaranteed: a threshold matters only by which samples exit, so every exit has at most N + 1 distinguishable
    cuts. With few combinations of them (one early exit: always; two: up to 2,800 samples; three: 190; four: 40) all are
    tried and the answer is the optimum. With more, the bound still holds and the answer is a local optimum: no change
    of one threshold improves it, nor does one of two at a time among about 150 cuts of each. The search starts from the
    optima without the bound at many prices of cost (`pareto_front`), and with fewer than 50,000 samples again from
    random changes of its answer, the same ones each time. 50,000 samples and eight exits take some 5 s on two cores.
    A threshold is half-way between two confidences that occurred, so none of them ties with it.
    Raises `ValueError` if nothing found keeps the bound, with the nearest that was found.
    """
    if (min_accuracy is None) == (max_cost is None):
        raise ValueError(f"min_accuracy={min_accuracy}, max_cost={max_cost}: give exactly one of them")
    cuts = Cuts(outputs, labels, cost, criterion)
    n = len(labels)

    def excess(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        return mean_cost - max_cost if max_cost is not None else min_accuracy - accuracy

    def within_bound(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        # Ties go to the lower cost, or to the higher accuracy: accuracies differ by at least 1 / n.
        gain = accuracy - mean_cost / (4 * n) if max_cost is not None else 1e-9 * accuracy - mean_cost
        # Both are within a few units of 0, so everything feasible is above everything infeasible.
        return gain.where(excess(totals) <= 1e-12, -100 - excess(totals))

    best = search.find_best(cuts, within_bound)
    totals = cuts.totals(best)
    chosen = _calibration(cuts, criterion, best, totals)
    # Looser than the search, whose running sums differ from the sum over all in the last bits.
    if not float(excess(totals)) <= 1e-9:
        bound = f"min_accuracy={min_accuracy}" if min_accuracy is not None else f"max_cost={max_cost}"
        raise ValueError(
            f"{bound} cannot be kept; the nearest is accuracy {chosen.accuracy:.4f} at mean cost {chosen.cost:.4f}"
        )
    return chosen


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


def least_images(max_accuracy_drop: float | None = None) -> int:
    """The number of samples that thresholds should at least be chosen on.

    100, of which one is a hundredth of the accuracy. With a bound on the drop of accuracy enough that one sample is no
    more than that drop: 200 for 0.005. Drops below 0.001 ask for 1,000.
    """
    return 100 if max_accuracy_drop is None else max(100, ceil(1 / max(max_accuracy_drop, 0.001)))


def save_thresholds(net: EarlyExitNet, folder: str | Path, chosen: Mapping[str, Calibration]) -> EarlyExitNet:
    """Write the network with its new thresholds to `folder`, and those of all criteria in `chosen` to thresholds.json.

    The network keeps its criterion where that is among `chosen`, else it takes the first one there. The folder's files
    are replaced together, or not at all. Raises as `EarlyExitNet.save` does.
    """
    name = net.criterion.name if net.criterion.name in chosen else next(iter(chosen))
    thresholds = chosen[name].thresholds
    net = net if name == net.criterion.name else net.with_criterion(name)
    if net.config is not None and "float_thresholds" in net.config:  # a quantised network has its own from now on
        net.config = {**net.config, "float_thresholds": {}}
    net.thresholds.copy_(torch.tensor(thresholds))
    found = {name: list(c.thresholds) for name, c in chosen.items()}
    with files.together():
        net.save(folder)
        files.write(Path(folder) / THRESHOLDS_FILE, json.dumps(found, indent=2) + "\n")
    return net
