"""The search for thresholds, against trying every combination."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_outputs import costs_of, every_point, looped, make_outputs

from eefast import ExitOutput, criteria
from eefast.thresholds import search
from eefast.thresholds.calibration import calibrate, pareto_front
from eefast.thresholds.outputs import outcome


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    exits=st.integers(2, 4),
    seed=st.integers(0, 10**6),
    criterion=st.sampled_from(list(criteria.CRITERIA)),
    rounded=st.booleans(),
    # Costs that differ from the bound by a rounding keep it.
    bound=st.floats(0.1, 1.0).map(lambda value: round(value, 6)),
    by_cost=st.booleans(),
)
def test_few_samples_are_exact(n, exits, seed, criterion, rounded, bound, by_cost) -> None:
    n = min(n, 7) if exits == 4 else n
    outputs, labels = make_outputs(n, exits, seed, rounded)
    cost = costs_of(exits)
    points = every_point(outputs, labels, cost, criterion)
    if by_cost:
        feasible = [(accuracy, -cost) for accuracy, cost in points if cost <= bound]
        wanted, nearest = {"max_cost": bound}, min(cost for _, cost in points)
    else:
        feasible = [(-cost, accuracy) for accuracy, cost in points if accuracy >= bound]
        wanted, nearest = {"min_accuracy": bound}, max(accuracy for accuracy, _ in points)
    if not feasible:
        words = r"at mean cost" if by_cost else "the nearest is accuracy"
        with pytest.raises(ValueError, match=rf"cannot be kept.*{words} {nearest:.4f}"):
            calibrate(outputs, labels, cost, criterion, **wanted)
        return
    found = calibrate(outputs, labels, cost, criterion, **wanted)
    got = (found.accuracy, -found.cost) if by_cost else (-found.cost, found.accuracy)
    assert got == pytest.approx(max(feasible))
    assert looped(outputs, labels, cost, criterion, found.thresholds) == pytest.approx((found.accuracy, found.cost))


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("exits", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_all_that_nothing_beats(criterion: str, exits: int, seed: int) -> None:
    outputs, labels = make_outputs(11, exits, seed, rounded=seed % 2 == 0)
    points = set(every_point(outputs, labels, costs_of(exits), criterion))
    best = {(a, c) for a, c in points if not any(b >= a and d <= c and (b, d) != (a, c) for b, d in points)}
    found = pareto_front(outputs, labels, costs_of(exits), criterion)
    got = np.array([(f.accuracy, f.cost) for f in found])
    assert got == pytest.approx(np.array(sorted(best, key=lambda point: point[1])))
    for f in found:
        again = looped(outputs, labels, costs_of(exits), criterion, f.thresholds)
        assert again == pytest.approx((f.accuracy, f.cost))


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize(("n", "exits"), [(257, 3), (43, 4)])
@pytest.mark.sampled(4)
def test_the_search_comes_close_to_the_optimum(monkeypatch, criterion: str, n: int, exits: int) -> None:
    cost = costs_of(exits)
    losses = []
    for seed in range(2):
        outputs, labels = make_outputs(n, exits, seed)
        for bound in (0.3, 0.5):
            monkeypatch.setattr(search, "EXHAUSTIVE_STEPS", 20_000_000)
            exact = calibrate(outputs, labels, cost, criterion, max_cost=bound)
            monkeypatch.setattr(search, "EXHAUSTIVE_STEPS", 0)
            found = calibrate(outputs, labels, cost, criterion, max_cost=bound)
            assert found.cost <= bound
            assert found.accuracy <= exact.accuracy
            losses.append(exact.accuracy - found.accuracy)
            found = calibrate(outputs, labels, cost, criterion, min_accuracy=exact.accuracy - 1e-9)
            assert found.cost <= exact.cost + 0.02
    # At most one sample more is wrong, and seldom that.
    assert max(losses) <= 1.01 / n
    assert sum(loss > 0 for loss in losses) <= 1


@pytest.mark.parametrize("seed", range(2))
def test_two_thresholds_move_together(monkeypatch, seed: int) -> None:
    """Within a bound that is used up no single threshold can move; here that would cost three to six points."""
    cost = torch.tensor([0.1, 0.55, 1.0])
    outputs, labels = make_outputs(1500, 3, seed)
    exact = calibrate(outputs, labels, cost, max_cost=0.3)
    monkeypatch.setattr(search, "EXHAUSTIVE_STEPS", 0)
    monkeypatch.setattr(search, "RESTARTS", 0)
    found = calibrate(outputs, labels, cost, max_cost=0.3)
    assert exact.accuracy - 0.001 <= found.accuracy <= exact.accuracy


@pytest.fixture(scope="module")
def planted():
    """3,000 samples of 12 kinds, their labels, and accuracy and cost of all thresholds between the kinds."""
    kinds, kind_labels = make_outputs(12, 4, 5)
    random = torch.Generator().manual_seed(0)
    outputs = []
    for out in kinds:
        z = out.confidence_logit.repeat(250) + 1e-4 * torch.rand(3000, generator=random)
        outputs.append(ExitOutput(out.logits.repeat(250, 1), torch.sigmoid(z), z))
    return outputs, kind_labels.repeat(250), every_point(kinds, kind_labels, costs_of(4), "learned")


@pytest.mark.parametrize("bound", [0.2, 0.3, 0.5])
def test_search_finds_a_planted_optimum(planted, bound: float) -> None:
    """At least what is best for the kinds, since a threshold may split a kind too."""
    outputs, labels, points = planted
    best = max(accuracy for accuracy, cost in points if cost <= bound)
    found = calibrate(outputs, labels, costs_of(4), max_cost=bound)
    assert found.cost <= bound
    assert found.accuracy >= best - 1e-9


@pytest.mark.parametrize("n", [10_000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_many_samples_and_eight_exits(n: int) -> None:
    """Measured in time of the processor, so that others' work does not count: 10 s for 50,000 on two cores."""
    outputs, labels = make_outputs(n, 8, 0, classes=10)
    begin = time.process_time()
    found = calibrate(outputs, labels, torch.linspace(0.1, 1, 8), max_cost=0.4)
    assert time.process_time() - begin < n / 2500
    assert found.cost <= 0.4
    expected = outcome(outputs, labels, torch.linspace(0.1, 1, 8), "learned", found.thresholds)
    assert (found.accuracy, found.cost) == pytest.approx(expected)


def test_many_exits_with_few_cuts_are_searched_and_not_tried_one_and_all() -> None:
    """Five cuts at each of eight exits: few combinations, but a pass over 3,000 samples for each would take minutes."""
    outputs, labels = make_outputs(3000, 9, 0)
    outputs = [out._replace(confidence_logit=out.confidence_logit.clamp(-1, 3).round()) for out in outputs]
    begin = time.process_time()
    found = calibrate(outputs, labels, torch.linspace(0.1, 1, 9), max_cost=0.4)
    assert time.process_time() - begin < 20
    assert found.cost <= 0.4
