"""Candidates → the exits that each placement scheme of EENets has within a limit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..system.progress import Progress
from ..thresholds.calibration import calibrate
from ..zoo.eenets import block_costs
from ..zoo.placement import SCHEMES, place
from .candidates import Candidates, Subset
from .choice import Kept
from .supernet import Supernet

MOST_EXITS = 8


def scheme_exits(
    supernet: Supernet, candidates: Candidates, criterion: str, limit: float, progress: Progress
) -> dict[str, Kept]:
    """By scheme the most accurate of its placements of 1 … `MOST_EXITS` exits, with thresholds for each exit.

    Heads are those of the supernet, of its first kind; for a place that it does not have, the place nearest in cost.
    Schemes that do not keep the limit are left out. The blocks of a backbone are what lies between the places that are
    searched.
    """
    found: dict[str, Kept] = {}
    for i, scheme in enumerate(SCHEMES):
        progress("placement schemes", i, len(SCHEMES))
        for subset in dict.fromkeys(_placements(supernet, scheme)):
            seen = candidates.outputs_of(subset), candidates.labels, candidates.cost_of(subset)
            try:
                kept = Kept(subset, calibrate(*seen, criterion, max_cost=limit))
            except ValueError:
                continue
            if scheme not in found or _value(kept) > _value(found[scheme]):
                found[scheme] = kept
    progress("placement schemes", len(SCHEMES), len(SCHEMES))
    return found


def _placements(supernet: Supernet, scheme: str) -> Iterator[Subset]:
    """The candidates at the scheme's places, for every number of exits that it can place."""
    net, first = supernet.net, supernet.kinds[0]
    blocks: Sequence[str | int] = supernet.places
    if supernet.body is None:
        costs: Sequence[float] = block_costs(net.name, net.num_classes, net.input_shape)
    else:
        blocks, costs = [number + 1 for number in supernet.place_numbers], _costs_to_places(supernet)
    at = {int(block): e for e, (block, kind) in enumerate(zip(blocks, supernet.kinds, strict=True)) if kind == first}
    upto = [0.0, *costs]
    for count in range(1, MOST_EXITS + 1):
        try:
            places = place(costs, count, scheme)
        except ValueError:
            return
        near = {min(at, key=lambda there: abs(upto[there] - upto[block])) for block in places}
        yield tuple(sorted(at[block] for block in near))


def _costs_to_places(supernet: Supernet) -> list[float]:
    """MACs up to every place, ascending ÷ those of all stages."""
    macs = [cost.stage_macs for cost in supernet.net.stage_costs]
    firsts = dict(reversed([*zip(supernet.place_numbers, range(len(macs)), strict=False)]))
    return [sum(macs[: firsts[number] + 1]) / sum(macs) for number in sorted(firsts)]


def _value(kept: Kept) -> tuple[float, float]:
    return kept.thresholds.accuracy, -kept.thresholds.cost
