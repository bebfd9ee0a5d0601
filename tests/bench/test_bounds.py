"""bench/bounds.py: its rows count broken bounds on the images that did not choose."""

import bounds
import pytest
import torch
from made_outputs import looped, make_outputs

from eefast.thresholds.calibration import calibrate

COST = torch.tensor([0.2, 0.5, 1.0])


@pytest.mark.parametrize("bound", [{"max_accuracy_drop": 0.1}, {"max_cost": 0.5}], ids=["drop", "cost"])
@pytest.mark.parametrize("assurance", [None, 0.8])
def test_a_row_counts_what_the_other_images_say(bound, assurance):
    exits, labels = make_outputs(257, 3, 0)
    row = bounds.measured("made", "margin", bounds.Outputs(exits, labels, COST), 151, 3, bound, assurance)
    drops, costs = [], []
    for draw in range(3):
        order = torch.randperm(257, generator=torch.Generator().manual_seed(draw)) if draw else torch.arange(257)
        choose, judge = order[:151], order[151:]
        found = calibrate(
            [type(out)(*(p[choose] for p in out)) for out in exits], labels[choose], COST, "margin",
            assurance=assurance, **bound,
        )  # fmt: skip
        outputs = [type(out)(*(p[judge] for p in out)) for out in exits]
        accuracy, cost = looped(outputs, labels[judge], COST, "margin", found.thresholds)
        drops.append(float((outputs[-1].logits.argmax(1) == labels[judge]).double().mean()) - accuracy)
        costs.append(cost)
    assert row.drops == pytest.approx((sum(drops) / 3, max(drops)))
    assert row.costs == pytest.approx((sum(costs) / 3, max(costs)))
    (most,) = bound.values()
    assert row.broken == sum(value > most for value in (drops if "max_accuracy_drop" in bound else costs))
    assert (row.images, row.new_images, row.draws, row.refused) == (151, 106, 3, 0)
    line = bounds.table([row])[-1]
    assert f"{row.broken} of 3" in line
    assert ("none" if assurance is None else "0.8") in line


def test_draws_without_thresholds_are_counted():
    exits, labels = make_outputs(150, 3, 0)
    row = bounds.measured("made", "margin", bounds.Outputs(exits, labels, COST), 120, 2, {"max_cost": 0.1}, 0.9)
    assert (row.refused, row.broken, row.drops, row.costs) == (2, 0, None, None)
    assert "0 of 2" in bounds.table([row])[-1]


@pytest.mark.parametrize(("lost", "broken"), [(0.3, 0), (0.3001, 2)])
def test_a_bound_that_is_just_kept_is_not_broken(lost, broken, monkeypatch):
    """0.8 - 0.5 is a little more than 0.3 in floats."""
    exits, labels = make_outputs(150, 3, 0)
    monkeypatch.setattr(bounds.Outputs, "final_accuracy", lambda outputs: 0.8)
    monkeypatch.setattr(bounds, "outcome", lambda *_: (0.5 + 0.3 - lost, 0.5))
    row = bounds.measured(
        "made", "margin", bounds.Outputs(exits, labels, COST), 120, 2, {"max_accuracy_drop": 0.3}, None
    )
    assert 0.8 - 0.5 > 0.3
    assert row.broken == broken
