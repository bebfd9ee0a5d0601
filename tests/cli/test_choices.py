"""What `eefast bench` chooses: the best criterion within a budget, an even curve; a budget that is exceeded is said."""

import pytest

from eefast.cli import choices
from eefast.measure.assessment import Assessment
from eefast.thresholds.calibration import Calibration
from eefast.thresholds.evaluation import Evaluation


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("max_accuracy_drop", 0.01, "max_accuracy_drop 0.0200 instead of 0.01"),
        ("min_accuracy", 0.98, "min_accuracy 0.9700 instead of 0.98"),
        ("max_cost", 0.1, "max_cost 0.2000 instead of 0.1"),
        *[("max_accuracy_drop", 0.03, ""), ("min_accuracy", 0.96, ""), ("max_cost", 0.3, "")],
    ],
)
def test_a_budget_that_test_images_break_is_said(kind, value, words):
    early = Evaluation(100, 0.97, 0.2, 0.2, (), (), (), ())
    found = Assessment(0.99, early, {}, (), (), (), "compact", "", {})
    said = choices.excess(found, kind, value)
    assert said == (words and f"the budget is not kept on the test images: {words}")


def test_the_cheapest_criterion_is_taken_and_the_curve_is_even():
    def chosen(cost, accuracy):
        return Calibration("learned", (0.5,), accuracy, cost)

    three = {"a": chosen(0.5, 0.9), "b": chosen(0.3, 0.8), "c": chosen(0.3, 0.85)}
    assert choices.best_criterion(three, "max_accuracy_drop") == "c"
    assert choices.best_criterion(three, "max_cost") == "a"
    front = [chosen(cost, cost) for cost in (0.1, 0.11, 0.12, 0.3, 0.5)]
    assert [point.cost for point in choices.evenly_by_cost(front, 3)] == [0.1, 0.3, 0.5]
    assert choices.evenly_by_cost(front[:1], 3) == front[:1]
    assert choices.evenly_by_cost([], 3) == []
