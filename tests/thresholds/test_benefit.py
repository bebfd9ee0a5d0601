"""One threshold for all exits, beside sample after sample."""

import pytest
from made_outputs import costs_of, looped, make_outputs

from eefast.thresholds.benefit import benefit_curve


@pytest.mark.parametrize(("criterion", "last"), [("max_probability", 1.0), ("entropy", 1.3862943611198906)])
def test_every_point_is_what_its_threshold_does(criterion, last):
    outputs, labels = make_outputs(31, 4, seed=3)
    found = benefit_curve(outputs, labels, costs_of(4), criterion)
    assert [point.threshold for point in found] == pytest.approx([last * step / 100 for step in range(101)])
    for point in (found[0], found[37], found[80], found[100]):
        expected = looped(outputs, labels, costs_of(4), criterion, [point.threshold] * 3)
        assert (point.accuracy, point.cost) == pytest.approx(expected)
    costs = [point.cost for point in found]
    assert costs == sorted(costs, reverse=criterion == "entropy")
    assert {costs[0], costs[-1]} == {0.125, 1.0}


def test_one_point_is_no_curve():
    outputs, labels = make_outputs(3, 2, seed=1)
    with pytest.raises(ValueError, match="points=1 must be at least 2"):
        benefit_curve(outputs, labels, costs_of(2), "learned", points=1)
