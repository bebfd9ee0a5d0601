"""Candidates and limits → the subset, rule and thresholds with the most right answers within the limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..criteria import get
from ..system.progress import Progress
from ..thresholds import search
from ..thresholds.calibration import Calibration, calibrate
from ..thresholds.cuts import Cuts
from ..thresholds.outputs import exits_taken, outcome
from .candidates import Candidates, Subset
from .shortlist import Ranked, Shortlist
from .subsets import Totals

# All subsets of twelve places with two kinds of heads each, half a minute for an exit rule.
MOST_SUBSETS = 3**12
# Subsets that get thresholds of their own for each exit; where there are few in all, every one.
FINALISTS, FEW = 16, 64


@dataclass(frozen=True)
class Kept:
    """A subset of candidates with an exit rule and thresholds; accuracy and mean cost are of the held-out samples."""

    subset: Subset
    thresholds: Calibration


@dataclass(frozen=True)
class Choice:
    """What was found.

    front: subsets at levels of which none has lower cost and no lower accuracy than another, by ascending cost.
    subsets: how many were compared, under each rule; all_subsets: whether these are all.
    all_thresholds: whether all thresholds of all of them were tried, so that none is better on these samples.
    """

    best: Kept
    front: tuple[Kept, ...]
    subsets: int
    all_subsets: bool
    all_thresholds: bool


def choose(
    candidates: Candidates,
    criteria: Sequence[str],
    progress: Progress,
    *,
    max_cost: float | None = None,
    max_parameters: int | None = None,
    limit_name: str = "max_cost",
) -> Choice:
    """Of subsets with at least one early exit, the one with the highest accuracy; of equal ones that of lowest cost.

    max_cost: of the mean cost, heads included, relative to the network without exits, in the unit of the candidates'
        costs, and limit_name what it is called in messages. max_parameters: of the network. criteria: names of exit
        rules, of which the best is taken.

    Where there are at most `MOST_SUBSETS`, all are compared, at levels that all of their exits share, see `levels`;
    else those that a local search comes across, which changes one place at a time. The `FINALISTS` best then get
    thresholds for each exit by `calibrate`; where there are no more than `FEW` subsets and rules, all do.
    Raises `ValueError` where no subset keeps the limits.
    """
    dearest = (max(there, key=lambda e: float(candidates.cost_of((e,)).max())) for there in candidates.by_place)
    most = candidates.cost_of(tuple(dearest)).max()
    limit = float(most) + 1 if max_cost is None else max_cost
    everything = candidates.count * len(criteria) <= FEW
    ends = (float(candidates.cost_of((0,))[0]), float(most))
    shortlist = Shortlist(candidates, limit, FEW if everything else FINALISTS, max_parameters, ends)
    totals = {name: Totals(candidates, name) for name in criteria}
    every = candidates.count <= MOST_SUBSETS
    compared = 0
    for name in criteria:
        compared = (_compare_all if every else _climb)(totals[name], name, shortlist, progress)
    if not shortlist.best:
        raise ValueError(_impossible(candidates, shortlist.cheapest, limit_name, max_cost, max_parameters))
    finalists, best, exhaustive = sorted(shortlist.best, reverse=True), [], everything
    for i, ranked in enumerate(finalists):
        progress("thresholds of the best", i, len(finalists))
        at_level = _at_level(candidates, totals, ranked)
        best.append(_without_unused(candidates, at_level))
        kept = candidates.outputs_of(ranked.subset), candidates.labels, candidates.cost_of(ranked.subset)
        exhaustive = exhaustive and search.is_exhaustive(Cuts(*kept, ranked.criterion))
        try:
            searched = replace(at_level, thresholds=calibrate(*kept, ranked.criterion, max_cost=limit))
            best.append(_without_unused(candidates, searched))
        except ValueError:
            continue  # the local search found less than the level, which keeps the limit
    progress("thresholds of the best", len(finalists), len(finalists))
    return Choice(
        max(best, key=lambda kept: (kept.thresholds.accuracy, -kept.thresholds.cost)),
        tuple(_at_level(candidates, totals, ranked) for ranked in shortlist.front),
        compared,
        every,
        exhaustive,
    )


def _compare_all(totals: Totals, criterion: str, shortlist: Shortlist, progress: Progress) -> int:
    total = totals.candidates.count
    for done, (subset, right, cost) in enumerate(totals.of_all()):
        if done % 1000 == 0:
            progress(f"subsets, {criterion}", done, total)
        shortlist.consider(criterion, subset, right, cost)
    progress(f"subsets, {criterion}", total, total)
    return total - 1


def _climb(totals: Totals, criterion: str, shortlist: Shortlist, progress: Progress) -> int:
    """One place is changed at a time, to what gains most, for as long as something gains; from each exit alone."""
    places, seen = totals.candidates.by_place, dict[Subset, float]()

    def value(subset: Subset) -> float:
        if subset not in seen:
            seen[subset] = shortlist.consider(criterion, subset, *totals.of(subset))
        return seen[subset]

    for i, there in enumerate(places):
        progress(f"subsets, {criterion}", i, len(places))
        best: Subset = max(((e,) for e in there), key=value)
        while True:
            others = [_changed(best, place, e) for place in places for e in (None, *place)]
            better = max(others, key=value)
            if not value(better) > value(best):
                break
            best = better
    progress(f"subsets, {criterion}", len(places), len(places))
    return len(seen)


def _changed(subset: Subset, place: Sequence[int], e: int | None) -> Subset:
    """The subset with candidate e, or none, at this place."""
    rest = [other for other in subset if other not in place]
    return tuple(sorted(rest if e is None else [*rest, e]))


def _at_level(candidates: Candidates, totals: dict[str, Totals], ranked: Ranked) -> Kept:
    thresholds = totals[ranked.criterion].thresholds(ranked.subset, ranked.level)
    return _kept(candidates, ranked.subset, ranked.criterion, thresholds)


def _kept(candidates: Candidates, subset: Subset, criterion: str, thresholds: Sequence[float]) -> Kept:
    seen = candidates.outputs_of(subset), candidates.labels, candidates.cost_of(subset)
    return Kept(subset, Calibration(criterion, tuple(thresholds), *outcome(*seen, criterion, thresholds)))


def _without_unused(candidates: Candidates, kept: Kept) -> Kept:
    """Without early exits that no sample takes, whose heads only cost; one stays."""
    found = kept.thresholds
    taken = exits_taken(candidates.outputs_of(kept.subset), get(found.criterion), found.thresholds).unique().tolist()
    used = [i for i in range(len(kept.subset)) if i in taken] or [0]
    subset = tuple(kept.subset[i] for i in used)
    return _kept(candidates, subset, found.criterion, [found.thresholds[i] for i in used])


def _impossible(
    candidates: Candidates, cheapest: float, limit_name: str, limit: float | None, max_parameters: int | None
) -> str:
    least = candidates.parameters[-1] + min(candidates.parameters[:-1])
    if max_parameters is not None and max_parameters < least:
        return f"max_parameters={max_parameters} is less than the network has with its smallest head, {least}"
    more = "" if max_parameters is None else f" with max_parameters={max_parameters}"
    unit = limit_name.removeprefix("max_")
    return f"{limit_name}={limit}{more} cannot be kept; the lowest mean {unit} is {cheapest:.4f}"
