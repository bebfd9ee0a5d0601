"""Cuts of all exits → the best choice of them under an objective: all combinations tried, or a local search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations, product
from math import prod

import torch
from torch import Tensor

from .cuts import Cuts

# Steps that may be spent on trying all combinations of cuts: about a second on two cores.
EXHAUSTIVE_STEPS = 8_000_000
# Restarts of the search from near its answer, each about a tenth of a second per 5,000 samples and five exits.
RESTARTS = 10

# Totals [2, …] (right answers, cost) → values [...] to be maximised.
Objective = Callable[[Tensor], Tensor]


def is_exhaustive(cuts: Cuts) -> bool:
    """Whether all combinations of cuts are tried."""
    *others, _, _ = sizes = [1, *map(len, cuts.sizes)]
    # Every combination of the others takes one table of the last two, and passes over all samples.
    return cuts.num_exits == 1 or prod(sizes) + prod(others) * (cuts.num_samples + 2000) <= EXHAUSTIVE_STEPS


def find_best(cuts: Cuts, objective: Objective) -> list[int]:
    """The picks with the largest `objective` found: the optimum where `is_exhaustive`, else a local one."""
    totals, front = find_front(cuts)
    at = int(objective(totals).argmax())
    best = front[at]
    if is_exhaustive(cuts):
        return best

    def better(found: list[int]) -> list[int]:
        return max(best, found, key=lambda picks: float(objective(cuts.totals(picks))))

    # A bound's optimum is sought from the points of the front next to it, on both sides.
    for start in front[max(at - 1, 0) : at + 2]:
        best = better(climb(cuts, objective, start, pairs=True))
    random = torch.Generator().manual_seed(0)
    for _ in range(min(RESTARTS, 49_999 // cuts.num_samples)):
        best = better(climb(cuts, objective, _perturbed(cuts, best, random), pairs=True))
    return best


def find_front(cuts: Cuts) -> tuple[Tensor, list[list[int]]]:
    """Totals [2, M] and picks by ascending cost, none worse in both than another; complete if `is_exhaustive`."""
    points = _lowest_cost_by_accuracy(cuts) if is_exhaustive(cuts) else _optima_by_price(cuts)
    found = sorted(points, key=lambda point: (point[1], -point[0]))
    most = list(accumulate((right for right, _, _ in found), max, initial=-1.0))
    front = [point for point, before in zip(found, most, strict=False) if point[0] > before + 0.5]
    return torch.tensor([point[:2] for point in front], dtype=torch.float64).T, [point[2] for point in front]


def climb(cuts: Cuts, objective: Objective, picks: Sequence[int], pairs: bool = False) -> list[int]:
    """Picks at which no change of one exit raises `objective`; with `pairs` none of two exits, as far as tried."""
    picks, best = list(picks), float(objective(cuts.totals(picks)))
    while True:
        before = best
        best = _improve_singles(cuts, objective, picks, best)
        if pairs and not best > before + 1e-12:
            best = _improve_pairs(cuts, objective, picks, best)
        if not best > before + 1e-12:
            return picks


def _improve_singles(cuts: Cuts, objective: Objective, picks: list[int], best: float) -> float:
    """Change one pick after the other, from the last exit to the first, in place; the new value."""
    arrives, gone = [torch.ones(cuts.num_samples, dtype=torch.bool)], [torch.zeros(2, 1, dtype=torch.float64)]
    for i in range(cuts.num_exits - 1):
        exits = cuts.selected(picks, i) & arrives[i]
        gone.append(gone[i] + (cuts.outcome[i] * exits).sum(dim=1, keepdim=True))
        arrives.append(arrives[i] & ~exits)
    later = cuts.outcome[-1]
    for i in reversed(range(cuts.num_exits)):
        value, pick = objective(gone[i] + cuts.sweep(i, arrives[i], later)).max(dim=0)
        if value > best:
            picks[i], best = int(pick), float(value)
        later = cuts.outcome[i].where(cuts.selected(picks, i), later)
    return best


def _improve_pairs(cuts: Cuts, objective: Objective, picks: list[int], best: float) -> float:
    """Change two picks at a time, in place; the new value."""
    for i, j in combinations(range(cuts.num_exits), 2):
        columns = _candidates(cuts, i, picks[i]), _candidates(cuts, j, picks[j])
        values = objective(cuts.sweep_pair(picks, i, j, columns))
        if values.max() > best:
            a, b = divmod(int(values.argmax()), len(columns[1]))
            picks[i], picks[j], best = int(columns[0][a]), int(columns[1][b]), float(values.max())
    return best


def _candidates(cuts: Cuts, i: int, pick: int) -> Tensor:
    """Cuts of exit i to try together with another exit's: evenly spread, and denser towards `pick`."""
    last = len(cuts.sizes[i]) - 1
    steps = torch.logspace(0, 5, 40).long()
    return torch.cat([torch.linspace(0, last, 96).long(), pick - steps, pick + steps]).clamp(0, last).unique()


def _perturbed(cuts: Cuts, picks: Sequence[int], random: torch.Generator) -> list[int]:
    """The cuts of two exits moved at random, by up to an eighth of all cuts."""
    moved = list(picks)
    for i in torch.randperm(cuts.num_exits, generator=random)[:2].tolist():
        last = len(cuts.sizes[i]) - 1
        step = int(torch.randint(-last // 8, last // 8 + 1, (1,), generator=random))
        moved[i] = min(max(picks[i] + step, 0), last)
    return moved


def _optima_by_price(cuts: Cuts) -> Iterator[tuple[float, float, list[int]]]:
    """(right, cost, picks): optima of accuracy - price × cost for prices from 0 to where only cost counts, and back."""
    prices = [0.0, *torch.logspace(-4, 1, 26).tolist()]
    for picks, path in (
        ([0] * cuts.num_exits, prices),
        ([len(sizes) - 1 for sizes in cuts.sizes], reversed(prices)),
    ):
        for price in path:

            def gain(totals: Tensor, price: float = price) -> Tensor:
                return totals[0] - price * totals[1]

            picks = climb(cuts, gain, picks)
            right, cost = cuts.totals(picks).tolist()
            yield right, cost, picks


def _lowest_cost_by_accuracy(cuts: Cuts) -> Iterator[tuple[float, float, list[int]]]:
    """(right, cost, picks): for every number of right answers the combination of cuts with the lowest cost."""
    lowest_cost = torch.full((cuts.num_samples + 1,), torch.inf, dtype=torch.float64)
    best: list[list[int]] = [[] for _ in lowest_cost]
    last = len(cuts.sizes[-1])
    for others in product(*(range(len(sizes)) for sizes in cuts.sizes[:-2])):
        right, cost = _last_two(cuts, others).flatten(1)
        right = right.round().long()
        least = torch.full_like(lowest_cost, torch.inf).scatter_reduce(0, right, cost, "amin")
        cell = torch.empty_like(lowest_cost, dtype=torch.int64)
        chosen = (cost == least[right]).nonzero().flatten()
        cell[right[chosen]] = chosen
        for r in (least < lowest_cost - 1e-9).nonzero().flatten().tolist():
            lowest_cost[r] = least[r]
            best[r] = [*others, *divmod(int(cell[r]), last)][-cuts.num_exits :]
    yield from ((float(r), float(lowest_cost[r]), picks) for r, picks in enumerate(best) if picks)


def _last_two(cuts: Cuts, others: Sequence[int]) -> Tensor:
    """Totals for all cuts of the last two exits, or of the only one."""
    if cuts.num_exits == 1:
        return cuts.sweep(0, torch.ones(cuts.num_samples, dtype=torch.bool), cuts.outcome[-1])
    i, j = cuts.num_exits - 2, cuts.num_exits - 1
    columns = torch.arange(len(cuts.sizes[i])), torch.arange(len(cuts.sizes[j]))
    return cuts.sweep_pair([*others, 0, 0], i, j, columns)
