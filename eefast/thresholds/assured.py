"""Outputs of all exits on held-out data → thresholds whose bounds hold on new data with a stated probability.

Three samples of ten lay a path of thresholds; the others walk it and stop at the first thresholds that the betting test
does not show to be within the bound. They go wrong only if the first thresholds outside the bound pass their test, so
the level of one test is that of the whole walk, however long the path (fixed-sequence testing; Angelopoulos et al.,
"Learn then Test").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite

import torch
from torch import Tensor

from .. import criteria
from ..result import ExitOutput
from . import betting, path
from .cuts import Cuts

LEAST_SAMPLES = 100
# The share of the samples that lays the path.
PATH_SHARE = 0.3
# Thresholds that are tested together: on a part of the samples, which are enough for most, and the others on all.
QUICK_BLOCK, BLOCK = 64, 16


@dataclass(frozen=True)
class Assured:
    """Thresholds, their accuracy and mean cost on all samples, and the number of samples that judged them."""

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float
    judged_by: int


def find_thresholds(
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    cost: Tensor,
    criterion: str,
    bounds: Mapping[str, float],
    assurance: float,
) -> Assured:
    """Thresholds that keep the bounds with probability `assurance`.

    Arguments as those of `calibration.calibrate`, which checks them; bounds: one on accuracy, one on cost, or both.
    Raises `ValueError` with fewer than `LEAST_SAMPLES` samples, and where no thresholds are shown to keep the bounds,
    with the nearest and about how many samples would have shown it.
    """
    count = len(labels)
    if count < LEAST_SAMPLES:
        raise ValueError(
            f"{count} samples are too few for assurance={assurance}; give at least {least_samples(bounds, assurance)}, "
            "or no assurance, which keeps the bounds on these samples only"
        )
    lay, judge = divided(count)
    rule = criteria.get(criterion)
    cuts = Cuts([ExitOutput(*(part[lay] for part in out)) for out in outputs], labels[lay], cost, criterion)
    points = path.accurate_to_cheap(cuts, rule)
    exits = _Exits(rule, [rule.confidence(out.logits, out.confidence_logit) for out in outputs[:-1]], points)
    right = torch.stack([out.logits.argmax(dim=1) == labels for out in outputs]).double()
    spent = cost.double().cpu()[:, None].expand_as(right)
    # Wrong about either bound with the sum of both levels at most.
    level = (1 - assurance) / len(bounds)
    walks = [_walk(name, value, right, spent, len(points)) for name, value in bounds.items()]
    passed = [_passed(walk, exits, lay, judge, level) for walk in walks]
    kept = sorted(set.intersection(*map(set, passed)))
    if not kept:
        given = ", ".join(f"{name}={value}" for name, value in bounds.items())
        # The thresholds at which the walks stopped.
        stops = [w.steps[max(len(p), w.certain)] for w, p in zip(walks, passed, strict=True) if len(p) < len(w.steps)]
        why = _refusal(walks, exits, stops, judge, level, right, spent)
        raise ValueError(
            f"{given}: {len(judge)} of the {count} samples do not show with assurance={assurance} that any thresholds "
            f"keep it; {why}"
        )
    # The most accurate of those that are cheap enough, or the cheapest of those that are accurate enough.
    at = kept[0] if list(bounds) == ["max_cost"] else kept[-1]
    accuracy, mean_cost = (float(exits.at(values, [at]).mean()) for values in (right, spent))
    return Assured(tuple(points[at].tolist()), accuracy, mean_cost, len(judge))


def divided(count: int) -> tuple[Tensor, Tensor]:
    """The samples that lay the path and those that judge, indices; always the same ones."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order[: round(PATH_SHARE * count)], order[round(PATH_SHARE * count) :]


def least_samples(bounds: Mapping[str, float], assurance: float) -> int:
    """The number of samples that it takes to keep the bounds where the early exits are never wrong; 100 at least.

    Of a bound that no number of samples can show to be kept, such as `max_accuracy_drop=0`, nothing is counted.
    """
    level, least = (1 - assurance) / len(bounds), LEAST_SAMPLES
    right, spent = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    for name, value in bounds.items():
        walk = _walk(name, value, right, spent, 1)
        enough = betting.samples_enough(walk.loss[0], walk.limit, level, walk.highest) / (1 - PATH_SHARE)
        least = max(least, ceil(enough)) if isfinite(enough) else least
    return least


@dataclass(frozen=True)
class _Exits:
    """rule, confidence: n times [N] float32, of the early exits; points: the path [M, n]."""

    rule: criteria.Criterion
    confidence: Sequence[Tensor]
    points: Tensor

    def of(self, samples: Tensor) -> _Exits:
        """The exits of some of the samples."""
        return _Exits(self.rule, [values[samples] for values in self.confidence], self.points)

    def at(self, values: Tensor, steps: Sequence[int]) -> Tensor:
        """The value [n + 1, N] of each sample at the exit that it takes by the thresholds of each step: [steps, N]."""
        thresholds, found = self.points[list(steps)], values[-1]
        for i in reversed(range(len(self.confidence))):
            found = values[i].where(self.rule.leaves(self.confidence[i], thresholds[:, i : i + 1]), found)
        return found


@dataclass(frozen=True)
class _Walk:
    """loss: of each sample at each exit [n + 1, N] float64, at most `highest`; its mean is to be at most `limit`.

    least_spread: see `betting.keeps`.
    steps: indices of the path's points in the order of the tests; certain: how many of the first ones need no test.
    """

    loss: Tensor
    limit: float
    highest: float
    least_spread: float
    steps: range
    certain: int = 0


def _walk(name: str, value: float, right: Tensor, spent: Tensor, length: int) -> _Walk:
    """right, spent: [n + 1, N] float64, whether each exit is right about each sample, and its cost."""
    if name == "max_cost":
        return _Walk(spent, value, max(float(spent.max()), value), 0.0, range(length)[::-1])
    limit = 1 - value if name == "min_accuracy" else value
    # Of a loss that is 0 or 1, at the bound.
    spread = limit * (1 - limit)
    if name == "min_accuracy":
        return _Walk(1 - right, limit, 1.0, spread, range(length))
    # Paired with the final exit: only samples about which the two differ count, so far fewer samples are enough.
    return _Walk(right[-1] - right, limit, 1.0, spread, range(length), certain=1)


def _passed(walk: _Walk, exits: _Exits, lay: Tensor, judge: Tensor, level: float) -> range:
    """The points that keep the bound, all of them with probability 1 - `level`; none where only certain ones do."""
    loss, before = ((walk.loss[:, samples], exits.of(samples)) for samples in (judge, lay))
    count = len(judge)
    quick = max(100, count // 16)
    some = loss[0][:, :quick], exits.of(judge[:quick])

    def kept(on: tuple[Tensor, _Exits], steps: Sequence[int]) -> Tensor:
        losses, known = (where.at(values, steps) for values, where in (on, before))
        return betting.keeps(losses, walk.limit, level, walk.highest, known, walk.least_spread, count)

    for start in range(walk.certain, len(walk.steps), QUICK_BLOCK):
        steps = walk.steps[start : start + QUICK_BLOCK]
        unclear = (~kept(some, steps)).nonzero().flatten()
        for block in unclear.split(BLOCK):
            shown = kept(loss, [steps[i] for i in block.tolist()])
            if not shown.all():
                known = start + int(block[shown.long().argmin()])
                return walk.steps[: known if known > walk.certain else 0]
    return walk.steps


def _refusal(
    walks: Sequence[_Walk],
    exits: _Exits,
    stops: Sequence[int],
    judge: Tensor,
    level: float,
    right: Tensor,
    spent: Tensor,
) -> str:
    """What the thresholds at which walks stopped do on the judging samples, and how many samples it would take."""
    exits = exits.of(judge)
    losses = [exits.at(walk.loss[:, judge], stops) for walk in walks]
    enough = [
        max(betting.samples_enough(loss[i], w.limit, level, w.highest) for loss, w in zip(losses, walks, strict=True))
        for i in range(len(stops))
    ]
    at = enough.index(min(enough))
    accuracy, mean_cost = (float(exits.at(values[:, judge], stops[at : at + 1]).mean()) for values in (right, spent))
    nearest = (
        f"the nearest have accuracy {accuracy:.4f}, where the final exit's is {float(right[-1, judge].mean()):.4f}, "
        f"at mean cost {mean_cost:.4f}"
    )
    if not isfinite(enough[at]):
        return f"{nearest}, outside it however many samples judge"
    samples = max(ceil(enough[at] / (1 - PATH_SHARE)), right.shape[1] + 1)
    return f"{nearest}; about {samples:,} samples would have been enough for them"
