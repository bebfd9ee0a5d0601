"""Losses of some samples and a bound → whether the mean loss of all samples keeps the bound, by a betting test."""

from __future__ import annotations

from math import ceil, log

import torch
from torch import Tensor

# The part of the largest stake with which one image could lose all.
CAUTION = 0.9


def keeps(
    loss: Tensor,
    bound: float,
    level: float,
    highest: float,
    before: Tensor | None = None,
    least_spread: float = 0.0,
    count: int | None = None,
) -> Tensor:
    """Whether the mean loss of the population is shown to be at most `bound`: [M] bool, for M losses.

    loss: [M, N] float64, at most `highest`, of N independent samples in an order that their losses did not decide.
    level: probability, at most, that a mean above the bound is taken for one within it.
    before: the same losses [M, N'] of other samples; least_spread: of (bound - loss)², where that is known. Both only
        make the stakes better.
    count: N, where `loss` is only of the first samples: what these show, all of them show.

    Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting": capital 1 is staked sample by
    sample on losses below the bound. If their mean is above it, no way of betting lets the capital grow in expectation,
    so that it ever reaches 1 / level with probability `level` at most (Ville). The stake on a sample is that of the
    paper's theorem 3 for N samples, with the spread of the samples before it.
    """
    gain = bound - loss
    count = loss.shape[1] if count is None else count
    known = gain[:, :0] if before is None else bound - before
    squares = gain.square()
    # In place, which takes half the time: first the sum of squares before each sample, as if one sample more had been
    # seen, with the largest loss.
    running = squares.cumsum(dim=1).add_((known**2).sum(dim=1, keepdim=True)).sub_(squares)
    spread = running.add_((highest - bound) ** 2).div_(known.shape[1] + 1 + torch.arange(loss.shape[1]))
    stake = spread.clamp_(min=least_spread).mul_(count).reciprocal_().mul_(-2 * log(level)).sqrt_()
    capital = stake.clamp_(max=_largest_stake(bound, highest)).mul_(gain).log1p_().cumsum(dim=1)
    return capital.amax(dim=1) >= -log(level)


def _largest_stake(bound: float, highest: float) -> float:
    return CAUTION / max(highest - bound, 1e-9)


def samples_enough(loss: Tensor, bound: float, level: float, highest: float) -> float:
    """About how many samples with losses as these [N] show that their mean is within the bound; inf where none do."""
    values, counts = loss.unique(return_counts=True)
    stakes = torch.logspace(-4, 0, 200, dtype=loss.dtype) * _largest_stake(bound, highest)
    growth = (((bound - values) * stakes[:, None]).log1p() * counts).sum(dim=1).max() / len(loss)
    return ceil(-log(level) / float(growth)) if growth > 0 else float("inf")
