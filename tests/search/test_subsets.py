"""Totals that are counted in bits, beside sample after sample."""

import numpy as np
import pytest
from candidate_cases import cost_of, make_candidates
from candidate_cases import subsets as every_subset

from eefast import criteria
from eefast.search import subsets
from eefast.search.subsets import Totals


# 64 samples fill a number, 67 do not.
@pytest.mark.parametrize(("samples", "criterion"), [(1, "margin"), (64, "learned"), (67, "entropy")])
def test_totals_are_those_of_thresholds_on_each_sample(samples, criterion):
    candidates = make_candidates(samples, [2, 1, 2], 5)
    totals, rule = Totals(candidates, criterion), criteria.get(criterion)
    score = [rule.confidence(out.logits, out.confidence_logit).tolist() for out in candidates.outputs]
    right = [(out.logits.argmax(1) == candidates.labels).tolist() for out in candidates.outputs]
    for subset in [(0,), (1, 2), (1, 2, 4), ()]:
        hits, spent = totals.of(subset)
        costs = cost_of(candidates, subset)
        for level in {0, len(hits) // 2, len(hits) - 1}:
            thresholds, expected = totals.thresholds(subset, level), [0, 0.0]
            for row in range(samples):
                taken = 5
                for e, t in zip(reversed(subset), reversed(thresholds), strict=True):
                    taken = e if (score[e][row] > t if rule.comparison == ">" else score[e][row] < t) else taken
                expected[0] += right[taken][row]
                expected[1] += costs[[*subset, 5].index(taken)]
            assert (hits[level], spent[level]) == pytest.approx(tuple(expected))


def test_all_subsets_come_once_with_their_totals():
    candidates = make_candidates(31, [2, 1, 2], 6)
    totals = Totals(candidates, "learned")
    found = {subset: (right, cost) for subset, right, cost in totals.of_all()}
    assert found.keys() == {(), *every_subset(candidates)}
    for subset, (right, cost) in found.items():
        expected = totals.of(subset)
        assert np.array_equal(right, expected[0])
        assert np.allclose(cost, expected[1])


def test_without_numpy_2_bits_are_counted_too(monkeypatch):
    candidates = make_candidates(67, [1, 1], 7)
    expected = Totals(candidates, "learned").of((0, 1))
    monkeypatch.delattr(subsets.np, "bitwise_count", raising=False)
    found = Totals(candidates, "learned").of((0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
