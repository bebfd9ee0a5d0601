"""bench/rules.py: its rows say what images that did not fit get right at equal cost."""

import pytest
import rules
import torch
from bounds import Outputs, divided
from made_outputs import costs_of, make_outputs

from eefast.thresholds.candidates import make_candidate
from eefast.thresholds.comparing import accuracies_at, path_of


@pytest.mark.parametrize("asked", [[], [0.4, 0.75]], ids=["default", "asked"])
def test_rows_are_means_over_divisions(asked):
    exits, labels = make_outputs(57, 3, 0)
    cost = costs_of(3)
    whole = Outputs(exits, labels, cost)
    found = rules.measured("made", ["vote", "margin"], whole, 31, 3, asked)
    assert [row.rule for row in found] == ["max_probability", "vote", "margin"]
    costs = asked or [0.25 * factor for factor in rules.COSTS]
    accuracy = {}
    for row in found:
        per_split = []
        for split in range(3):
            choose, judge = divided(whole, 31, split)
            candidate = make_candidate(row.rule, choose.exits, choose.labels)
            points = path_of(candidate, choose.exits, choose.labels, cost)
            per_split.append(accuracies_at(candidate, points, judge.exits, judge.labels, cost, costs))
        accuracy[row.rule] = torch.tensor(per_split, dtype=torch.float64)
        gains = accuracy[row.rule] - accuracy["max_probability"]
        assert row.costs == pytest.approx(costs)
        assert row.accuracy == pytest.approx(accuracy[row.rule].mean(0).tolist())
        assert row.gains == pytest.approx(gains.mean(0).tolist(), abs=1e-9)
        assert row.spreads == pytest.approx(gains.std(0, correction=0).tolist(), abs=1e-9)
        assert row.first == pytest.approx(per_split[0])
        assert (row.images, row.new_images, row.splits) == (31, 26, 3)
    lines = rules.table(found)
    assert f"{found[0].accuracy[0]:.2%}" in lines[-3]
    assert f"{100 * found[2].gains[1]:+.2f} ± {100 * found[2].spreads[1]:.2f}" in lines[-1]
