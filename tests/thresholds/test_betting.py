"""The betting test, against a capital counted sample by sample, and its error over all sequences of losses."""

import itertools
import math

import pytest
import torch

from eefast.thresholds import betting

LOSSES = {"0, 1": (0.0, 1.0), "-1, 0, 1": (-1.0, 0.0, 1.0), "costs": (0.125, 0.5, 1.0)}


def sequences(values, count: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(values, repeat=count)), dtype=torch.float64)


def by_hand(losses, bound, level, highest, before=(), least_spread=0.0, count=None) -> bool:
    """The capital itself, one bet after the other."""
    seen, capital, best = [(bound - x) ** 2 for x in before], 1.0, 1.0
    for x in losses:
        spread = max((sum(seen) + (highest - bound) ** 2) / (len(seen) + 1), least_spread)
        stake = min(math.sqrt(2 * math.log(1 / level) / ((count or len(losses)) * spread)), 0.9 / (highest - bound))
        capital *= 1 + stake * (bound - x)
        assert capital > 0
        best = max(best, capital)
        seen.append((bound - x) ** 2)
    return best >= 1 / level


@pytest.mark.parametrize("values", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize(("before", "least_spread"), [((), 0.0), ((0.5, 1.0, 0.0), 0.21)], ids=["alone", "others"])
def test_it_is_the_capital_of_one_bet_after_the_other(values, before, least_spread) -> None:
    losses = sequences(values, 5)
    others = torch.tensor([before] * len(losses), dtype=torch.float64).reshape(len(losses), -1)
    kept = betting.keeps(losses, 0.4, 0.5, 1.0, others, least_spread)
    assert kept.tolist() == [by_hand(row, 0.4, 0.5, 1.0, before, least_spread) for row in losses.tolist()]
    assert kept.any()
    assert not kept.all()


def test_the_first_samples_show_what_their_capital_shows() -> None:
    losses = sequences((-1.0, 0.0, 1.0), 6)
    known = losses[:, :2]
    kept = [betting.keeps(losses[:, :k], 0.4, 0.5, 1.0, known, count=6) for k in range(1, 7)]
    assert torch.equal(kept[-1], betting.keeps(losses, 0.4, 0.5, 1.0, known))
    assert all((less <= more).all() and less.any() for less, more in itertools.pairwise(kept[2:]))
    for k, part in enumerate(kept, 1):
        assert part.tolist() == [by_hand(row[:k], 0.4, 0.5, 1.0, row[:2], count=6) for row in losses.tolist()]


@pytest.mark.parametrize("bound", [0.2, 0.45])
@pytest.mark.parametrize("level", [0.1, 0.3])
def test_the_error_is_at_most_the_level_in_exact_binomials(bound: float, level: float) -> None:
    """P(kept) by the binomial distribution of all 2^12 sequences, at and above the bound."""
    losses = sequences((0.0, 1.0), 12)
    ones = losses.sum(dim=1)
    kept = betting.keeps(losses, bound, level, 1.0, least_spread=bound * (1 - bound))
    errors = [float((p**ones * (1 - p) ** (12 - ones))[kept].sum()) for p in (bound, bound + 0.01, 0.6, 0.9)]
    assert max(errors) <= level
    assert errors == sorted(errors, reverse=True)
    below = float((0.01**ones * 0.99 ** (12 - ones))[kept].sum())
    assert below > 0.5 or (bound, level) == (0.2, 0.1)  # 12 right answers do not show that


@pytest.mark.parametrize("fixed", [0.0, 0.1, 0.3])
def test_the_error_is_at_most_the_level_of_paired_losses(fixed: float) -> None:
    """Early exits that are right where the final one is not make up for others: the mean alone counts."""
    losses = sequences((-1.0, 0.0, 1.0), 8)
    broken = fixed + 0.25
    chance = torch.tensor([fixed, 1 - fixed - broken, broken], dtype=torch.float64)[(losses + 1).long()].prod(dim=1)
    assert float(chance.sum()) == pytest.approx(1)
    kept = betting.keeps(losses, 0.25, 0.2, 1.0)
    assert 0 < float(chance[kept].sum()) <= 0.2


@pytest.mark.parametrize(("bound", "level"), [(0.005, 0.1), (0.05, 0.01)])
def test_the_number_of_samples_is_the_least_without_losses(bound: float, level: float) -> None:
    enough = betting.samples_enough(torch.zeros(1, dtype=torch.float64), bound, level, 1.0)
    assert enough == math.ceil(math.log(1 / level) / math.log(1 + 0.9 / (1 - bound) * bound))
    for count, expected in ((enough, True), (enough - 1, False)):
        none = torch.zeros(1, int(count), dtype=torch.float64)
        assert betting.keeps(none, bound, level, 1.0, none, bound * (1 - bound)).tolist() == [expected]


def test_the_number_of_samples_is_enough_in_half_of_the_cases() -> None:
    random = torch.Generator().manual_seed(0)
    seen = (torch.arange(1000) < 20).double()
    enough = betting.samples_enough(seen, 0.04, 0.1, 1.0)
    for times, least, most in ((1.0, 0.4, 0.9), (3.0, 0.95, 1.0), (0.25, 0.0, 0.3)):
        losses = (torch.rand(400, int(times * enough), generator=random) < 0.02).double()
        share = float(betting.keeps(losses, 0.04, 0.1, 1.0, least_spread=0.04).double().mean())
        assert least <= share <= most, (times, share)
    assert betting.samples_enough(seen, 0.02, 0.1, 1.0) == math.inf
