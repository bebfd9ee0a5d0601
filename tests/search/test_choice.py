"""The best subset, rule and thresholds within limits, beside all that there are."""

from dataclasses import replace

import pytest
from candidate_cases import every_choice, make_candidates, silent

from eefast.search import choice
from eefast.search.choice import choose


@pytest.mark.parametrize("criteria", [("learned",), ("max_probability", "entropy")], ids="-".join)
@pytest.mark.parametrize("max_cost", [0.3, 0.55, 0.9])
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_it_is_the_best_of_all_subsets_and_thresholds(criteria, max_cost, seed):
    candidates = make_candidates(9, [2, 2, 1], seed)
    points = [point for name in criteria for point in every_choice(candidates, name) if point[1] <= max_cost]
    right, cost = max((right, -cost) for right, cost, _ in points)
    found = choose(candidates, criteria, silent, max_cost=max_cost)
    assert found.best.thresholds.accuracy == pytest.approx(right / 9)
    assert found.best.thresholds.cost == pytest.approx(-cost, abs=1e-6)
    assert found.subsets == 17
    assert found.all_subsets
    assert found.all_thresholds


def test_the_highest_number_of_parameters_is_kept():
    candidates = make_candidates(9, [2, 2, 1], 1)
    points = [p for p in every_choice(candidates, "learned") if candidates.parameters_of(p[2]) <= 1020]
    right, cost = max((right, -cost) for right, cost, _ in points)
    found = choose(candidates, ["learned"], silent, max_parameters=1020)
    assert candidates.parameters_of(found.best.subset) <= 1020
    assert (found.best.thresholds.accuracy, found.best.thresholds.cost) == pytest.approx((right / 9, -cost), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_parameters_alone_limit_no_cost(seed):
    """The second kind of head costs more than the whole network."""
    candidates = make_candidates(9, [2, 2, 1], seed)
    costs = [replace(c, head_macs=2000) if c.head_macs == 19 else c for c in candidates.costs]
    candidates = replace(candidates, costs=costs)
    right, cost = max((right, -cost) for right, cost, _ in every_choice(candidates, "learned"))
    found = choose(candidates, ["learned"], silent, max_parameters=10**6).best.thresholds
    assert (found.accuracy, found.cost) == pytest.approx((right / 9, -cost), abs=1e-6)


def test_a_limit_of_the_time_is_named():
    with pytest.raises(ValueError, match=r"max_time=0.1 cannot be kept; the lowest mean time is 0\.\d+"):
        choose(make_candidates(9, [2, 2, 1], 1), ["learned"], silent, max_cost=0.1, limit_name="max_time")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_cost": 0.1}, r"max_cost=0.1 cannot be kept; the lowest mean cost is 0\.\d+"),
        ({"max_parameters": 1009}, "max_parameters=1009 is less than the network has with its smallest head, 1010"),
        ({"max_cost": 0.1, "max_parameters": 1010}, "max_cost=0.1 with max_parameters=1010 cannot be kept"),
    ],
)
def test_limits_that_cannot_be_kept_say_what_can(limits, message):
    with pytest.raises(ValueError, match=message):
        choose(make_candidates(9, [2, 2, 1], 1), ["learned"], silent, **limits)


def test_the_front_ascends_and_no_point_of_it_is_better_than_the_best():
    candidates = make_candidates(67, [2, 2, 1], 3)
    found = choose(candidates, ["max_probability"], silent, max_cost=0.5)
    costs = [point.thresholds.cost for point in found.front]
    accuracies = [point.thresholds.accuracy for point in found.front]
    assert len(found.front) > 3
    assert costs == sorted(costs)
    assert accuracies == sorted(set(accuracies))
    within = [point.thresholds.accuracy for point in found.front if point.thresholds.cost <= 0.5]
    assert found.best.thresholds.accuracy >= max(within)
    assert found.best.thresholds.cost <= 0.5 + 1e-6


def test_a_local_search_is_said_to_be_one_and_is_not_better_than_all(monkeypatch):
    candidates = make_candidates(67, [2, 2, 2], 4)
    every = choose(candidates, ["learned"], silent, max_cost=0.6)
    monkeypatch.setattr(choice, "MOST_SUBSETS", 26)
    some = choose(candidates, ["learned"], silent, max_cost=0.6)
    assert (every.all_subsets, some.all_subsets) == (True, False)
    assert some.subsets <= every.subsets == 26
    assert some.best.thresholds.cost <= 0.6 + 1e-6
    assert every.best.thresholds.accuracy - 0.05 <= some.best.thresholds.accuracy
