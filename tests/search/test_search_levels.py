"""Cuts at shared levels, beside the sums that they must maximise."""

import pytest
import torch
from made_outputs import costs_of, make_outputs

from eefast.search.levels import CERTAINTIES, PRICES, level_picks
from eefast.thresholds.cuts import Cuts


@pytest.fixture(scope="module")
def cuts():
    outputs, labels = make_outputs(67, 3, seed=1, rounded=True)
    return Cuts(outputs, labels, costs_of(3), "learned")


def test_every_cut_lets_exit_what_pays(cuts):
    """For each level and exit: sample by sample, no other cut has a larger sum."""
    picks = {tuple(row) for row in level_picks(cuts, costs_of(3)).tolist()}
    right = cuts.outcome[:, 0].tolist()
    values = [[[r - level for r in right[i]] for i in range(2)] for level in CERTAINTIES]
    saved = [0.75, 0.5]
    values += [
        [[r - f + price * saved[i] for r, f in zip(right[i], right[2], strict=True)] for i in range(2)]
        for price in PRICES
    ]
    for value in values:
        best = []
        for i in range(2):
            order = cuts.order[i].tolist()
            sums = [sum(value[i][row] for row in order[:size]) for size in cuts.sizes[i].tolist()]
            best.append({pick for pick, found in enumerate(sums) if found >= max(sums) - 1e-9})
        assert any(row[0] in best[0] and row[1] in best[1] for row in picks)


def test_no_sample_and_every_sample_may_exit(cuts):
    picks = level_picks(cuts, costs_of(3))
    assert [0, 0] in picks.tolist()
    assert [len(sizes) - 1 for sizes in cuts.sizes] in picks.tolist()
    assert len(picks) == len(torch.unique(picks, dim=0))
