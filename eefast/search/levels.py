"""Cuts of every exit → which samples it lets exit at each of some levels that all exits share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..thresholds.cuts import Cuts

# How often an exit must be right about the last samples that it lets exit; at 2 none exits, at -1 every one.
CERTAINTIES = (2.0, *(1 - 10 ** -(4 - step / 6) for step in range(23)), -1.0)
# What a share 1 of the cost is worth in right answers; 24 of them.
PRICES = tuple(10 ** (step / 6 - 3) for step in range(24))


def level_picks(cuts: Cuts, cost: Tensor) -> Tensor:
    """[T, n] int64: the cut of every early exit at every level, without repetitions.

    cost: [n + 1], of each exit alone. Levels are of two kinds. With a certainty τ an exit lets the samples exit about
    which it is right more often than τ, those around one threshold: Σ (right - τ) over all that exit is largest. With
    a price λ it lets exit what pays against the final exit: Σ (right - right of the final exit + λ · cost saved) is
    largest. For one early exit alone, the latter are all optima of accuracy - λ · cost.
    """
    certainties = torch.tensor(CERTAINTIES, dtype=torch.float64)[:, None]
    prices = torch.tensor(PRICES, dtype=torch.float64)[:, None]
    final, columns = cuts.outcome[-1, 0], []
    for i in range(cuts.num_exits):
        sizes, right = cuts.sizes[i], cuts.outcome[i, 0]
        by_certainty = _sums(right, cuts, i) - certainties * sizes
        by_price = _sums(right - final, cuts, i) + prices * float(cost[-1] - cost[i]) * sizes
        columns.append(torch.cat([by_certainty, by_price]).argmax(dim=1))
    return torch.stack(columns, dim=1).unique(dim=0)


def _sums(values: Tensor, cuts: Cuts, i: int) -> Tensor:
    """[cuts of exit i]: the sum over all samples that each cut lets exit."""
    return nn.functional.pad(values[cuts.order[i]].cumsum(0), (1, 0))[cuts.sizes[i]]
