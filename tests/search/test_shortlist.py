"""The best of what is considered, and its front."""

import numpy as np
import pytest
from candidate_cases import make_candidates

from eefast.search.shortlist import Shortlist


def shortlist(limit=0.5, most=2, parameters=None):
    return Shortlist(make_candidates(10, [2, 1], 1), limit, most, parameters, (0.1, 1.0))


def consider(seen, subset, *points):
    """points: (right answers, mean cost) at each level."""
    right, cost = np.array(points, dtype=float).T
    return seen.consider("learned", subset, right, cost * 10)


def test_the_most_right_within_the_limit_are_kept():
    seen = shortlist()
    values = [
        consider(seen, (0,), (5, 0.2), (7, 0.4), (9, 0.6)),
        consider(seen, (1,), (7, 0.3), (7, 0.45)),
        consider(seen, (2,), (4, 0.1), (6, 0.5)),
        consider(seen, (0, 2), (9, 0.7), (3, 0.6)),
    ]
    assert values == pytest.approx([7, 7, 6, -0.1], abs=1e-6)
    assert [(r.subset, r.level, r.right, -r.saved) for r in sorted(seen.best, reverse=True)] == [
        ((1,), 0, 7, pytest.approx(0.3)),
        ((0,), 1, 7, pytest.approx(0.4)),
    ]
    assert seen.cheapest == pytest.approx(0.1)


def test_networks_without_exits_or_with_more_parameters_are_not_considered():
    seen = shortlist(parameters=1020)
    assert consider(seen, (), (9, 0.1)) == consider(seen, (1,), (9, 0.1)) == -np.inf
    assert consider(seen, (0, 2), (8, 0.1)) == pytest.approx(8)
    assert [ranked.subset for ranked in seen.best] == [(0, 2)]


def test_the_front_has_what_is_more_accurate_than_all_that_is_cheaper():
    seen = shortlist()
    consider(seen, (0,), (5, 0.2), (4, 0.3), (9, 0.9))
    consider(seen, (1,), (6, 0.2001), (7, 0.4), (9, 0.95))
    assert [(r.subset, r.level) for r in seen.front] in (
        [((1,), 0), ((1,), 1), ((0,), 2)],
        [((0,), 0), ((1,), 0), ((1,), 1), ((0,), 2)],
    )
