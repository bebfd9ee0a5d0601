"""Outputs of all exits on held-out data → the accuracy of exit rules at equal mean cost, over splits of the samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import criteria
from ..result import ExitOutput
from . import path
from .candidates import Candidate, make_candidate
from .cuts import Cuts
from .outputs import check_labels, exits_taken, some

BASE = "max_probability"
SPLITS = 10
# Rows of thresholds that are judged together.
BLOCK = 16


@dataclass(frozen=True)
class Comparison:
    """A rule beside the largest probability at the same mean cost: shares of right answers of 1.

    accuracy: mean over splits. gain, spread: of the accuracy above that of the largest probability, mean and standard
        deviation over splits, which share samples, so that it is no standard error.
    """

    accuracy: float
    gain: float
    spread: float


def compare(
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    cost: Tensor,
    names: Sequence[str],
    at: float,
    *,
    splits: int = SPLITS,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Comparison]:
    """The rules called `names` at mean cost `at`: one half of the samples fits and chooses, the other half judges.

    outputs, labels: of n + 1 exits on held-out samples; cost: [n + 1]. Raises `ValueError` as `make_candidate`.
    """
    check_labels(labels, len(outputs[0].logits))
    found: dict[str, list[float]] = {name: [] for name in dict.fromkeys((BASE, *names))}
    for split in range(splits):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(split))
        choose, judge = order[: len(order) // 2], order[len(order) // 2 :]
        for k, (name, accuracies) in enumerate(found.items()):
            if progress is not None:
                progress("comparing exit rules", split * len(found) + k, splits * len(found))
            candidate = make_candidate(name, some(outputs, choose), labels[choose])
            points = path_of(candidate, some(outputs, choose), labels[choose], cost)
            accuracies += accuracies_at(candidate, points, some(outputs, judge), labels[judge], cost, [at])
    if progress is not None:
        progress("comparing exit rules", splits * len(found), splits * len(found))
    base = torch.tensor(found[BASE], dtype=torch.float64)
    return {name: _comparison(torch.tensor(found[name], dtype=torch.float64), base) for name in names}


def path_of(candidate: Candidate, outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """Rows of thresholds [M, n] from no early exit to the lowest cost, see `path`."""
    cuts = Cuts(candidate.outputs(outputs), labels, cost, candidate.name)
    return path.accurate_to_cheap(cuts, criteria.get(candidate.name))


def accuracies_at(
    candidate: Candidate,
    points: Tensor,
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    cost: Tensor,
    costs: Sequence[float],
) -> list[float]:
    """Accuracy on these samples at each of the mean costs, between the two rows of `points` next to it in cost.

    Where no row has so low or so high a cost, that of the nearest.
    """
    seen = candidate.outputs(outputs)
    right = torch.stack([out.logits.argmax(dim=1) == labels for out in seen]).double()
    each, rule, totals = cost.double().cpu(), criteria.get(candidate.name), []
    for rows in points.split(BLOCK):
        taken = exits_taken(seen, rule, rows)
        totals.append(torch.stack([each[taken].mean(dim=1), right.gather(0, taken).mean(dim=1)]))
    x, y = torch.cat(totals, dim=1)
    order = x.argsort(stable=True)
    x, y = x[order], y[order]
    at = torch.tensor(costs, dtype=torch.float64).clamp(x[0], x[-1])
    upper = torch.searchsorted(x, at).clamp(min=1, max=max(len(x) - 1, 1)).clamp(max=len(x) - 1)
    lower = (upper - 1).clamp(min=0)
    part = ((at - x[lower]) / (x[upper] - x[lower])).nan_to_num(nan=1.0)
    return torch.lerp(y[lower], y[upper], part).tolist()


def _comparison(accuracy: Tensor, base: Tensor) -> Comparison:
    gain = accuracy - base
    return Comparison(float(accuracy.mean()), float(gain.mean()), float(gain.std(correction=0)))
