"""What subsets of candidates cost, and which there are."""

import pytest
from candidate_cases import cost_of, make_candidates, subsets

CANDIDATES = make_candidates(5, [2, 1, 3], 1)


def test_subsets_are_counted_with_that_of_none():
    assert CANDIDATES.by_place == [[0, 1], [2], [3, 4, 5]]
    assert CANDIDATES.count == len([*subsets(CANDIDATES)]) + 1 == 3 * 2 * 4


@pytest.mark.parametrize("subset", [(0,), (1, 2), (0, 2, 5), (4,)])
def test_heads_on_the_way_are_paid_for(subset):
    assert CANDIDATES.cost_of(subset).tolist() == pytest.approx(cost_of(CANDIDATES, subset))
    assert CANDIDATES.outputs_of(subset) == [CANDIDATES.outputs[e] for e in (*subset, 6)]
    assert CANDIDATES.left_out(subset) == [e for e in range(6) if e not in subset]


def test_parameters_are_those_of_the_heads_and_of_all_else():
    assert [CANDIDATES.parameters_of(subset) for subset in ((0,), (1, 2), (0, 2, 5))] == [1010, 1035, 1045]
