"""Candidates with made outputs, and every subset of them with all thresholds tried in whole numbers of samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from made_outputs import make_outputs

from eefast import criteria
from eefast.cost import StageCost
from eefast.search.candidates import Candidates


def make_candidates(samples: int, kinds: Sequence[int], seed: int) -> Candidates:
    """kinds: number of kinds of heads at each place. The second kind costs more, stages more than heads."""
    place = [p for p, count in enumerate(kinds) for _ in range(count)]
    outputs, labels = make_outputs(samples, len(place) + 1, seed)
    outputs = [out._replace(logits=out.logits / 2) for out in outputs]
    first = [e == 0 or place[e] != place[e - 1] for e in range(len(place))]
    costs = [StageCost(101 * new, 3 if new else 19, (0, 3, 3), 4) for new in first]
    parameters = [10 if new else 25 for new in first]
    return Candidates(outputs, labels, [*costs, StageCost(173, 11, (5, 1, 1), 4)], place, [*parameters, 1000])


def subsets(candidates: Candidates) -> Iterator[tuple[int, ...]]:
    """Every choice of none or one of each place, but for that of none at all."""
    places = sorted(set(candidates.place))
    options = [[None, *(e for e, at in enumerate(candidates.place) if at == p)] for p in places]
    for chosen in itertools.product(*options):
        if subset := tuple(e for e in chosen if e is not None):
            yield subset


def cost_of(candidates: Candidates, subset: Sequence[int]) -> list[float]:
    """Of each exit, added up layer by layer."""
    total = sum(cost.stage_macs for cost in candidates.costs) + candidates.costs[-1].head_macs - 5
    found, spent = [], 0
    for e, cost in enumerate(candidates.costs):
        spent += cost.stage_macs
        if e in subset or e == len(candidates.place):
            spent += cost.head_macs
            found.append(spent / total)
    return found


def every_choice(candidates: Candidates, criterion: str) -> Iterator[tuple[int, float, tuple[int, ...]]]:
    """(right answers, mean cost, subset) for all thresholds of all subsets; sets of samples are bits of a number."""
    rule, n = criteria.get(criterion), len(candidates.labels)
    sets, right = [], []
    for out in candidates.outputs:
        score = rule.confidence(out.logits, out.confidence_logit).tolist()
        right.append(bits((out.logits.argmax(1) == candidates.labels).tolist()))
        beyond = [[s > t if rule.comparison == ">" else s < t for s in score] for t in {*score}]
        sets.append({0, 2**n - 1, *map(bits, beyond)})
    for subset in subsets(candidates):
        costs = cost_of(candidates, subset)
        for exits in itertools.product(*(sets[e] for e in subset)):
            stay, hits, spent = 2**n - 1, 0, 0.0
            for e, there, cost in zip(subset, exits, costs, strict=False):
                hits += (stay & there & right[e]).bit_count()
                spent += cost * (stay & there).bit_count()
                stay &= ~there
            hits += (stay & right[-1]).bit_count()
            yield hits, (spent + costs[-1] * stay.bit_count()) / n, subset


def bits(flags: Sequence[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def silent(what: str, done: int, total: int) -> None:
    """A `Progress` that says nothing."""
