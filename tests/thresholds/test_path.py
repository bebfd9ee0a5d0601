"""The path of thresholds: from no early exit along the front to the lowest cost, in small steps."""

import itertools

import pytest
import torch
from made_outputs import looped, make_outputs

from eefast import criteria
from eefast.thresholds import path
from eefast.thresholds.calibration import pareto_front
from eefast.thresholds.cuts import Cuts

COST = torch.tensor([0.1, 0.3, 0.6, 1.0])


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize(("n", "exits"), [(257, 2), (101, 3), (257, 4)])
@pytest.mark.sampled(6)
def test_it_goes_from_no_early_exit_over_the_front_to_the_lowest_cost(criterion: str, n: int, exits: int) -> None:
    outputs, labels = make_outputs(n, exits, 0)
    cost, rule = COST[-exits:], criteria.get(criterion)
    points = path.accurate_to_cheap(Cuts(outputs, labels, cost, criterion), rule)
    assert points.dtype == torch.float32
    assert points[0].tolist() == [rule.never] * (exits - 1)
    assert len(points) <= path.POINTS + 1
    assert len(points.unique(dim=0)) == len(points)
    costs = [looped(outputs, labels, cost, criterion, point.tolist())[1] for point in points]
    assert costs[0] == 1
    assert costs[-1] == pytest.approx(float(cost[0]))
    assert max(a - b for a, b in itertools.pairwise(costs)) < 0.2
    front = pareto_front(outputs, labels, cost, criterion)
    corners = {tuple(torch.tensor(f.thresholds).tolist()) for f in front}
    seen = {tuple(point.tolist()) for point in points}
    assert len(corners & seen) == len(corners) or len(corners) > path.POINTS


def test_with_more_corners_than_points_some_are_left_out(monkeypatch) -> None:
    monkeypatch.setattr(path, "POINTS", 7)
    outputs, labels = make_outputs(257, 2, 0)
    cuts = Cuts(outputs, labels, COST[:2], "margin")
    points = path.accurate_to_cheap(cuts, criteria.get("margin"))
    assert 3 < len(points) <= 9
    assert points[-1, 0] == cuts.thresholds[0][-1]
