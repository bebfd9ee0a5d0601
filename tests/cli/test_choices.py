"""What `eefast bench` chooses: the best criterion within a budget, an even curve; a budget that is exceeded is said."""

from types import SimpleNamespace

import pytest
from made_outputs import make_outputs
from networks import lived_in

from eefast import zoo
from eefast.cli import choices
from eefast.measure.assessment import Assessment
from eefast.thresholds.calibration import Calibration, calibrate, pareto_front
from eefast.thresholds.evaluation import Evaluation, exit_quality


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("max_accuracy_drop", 0.01, "max_accuracy_drop 0.0200 instead of 0.01"),
        ("min_accuracy", 0.98, "min_accuracy 0.9700 instead of 0.98"),
        ("max_cost", 0.1, "max_cost 0.2000 instead of 0.1"),
        ("min_accuracy", 0.97004, "min_accuracy 0.9700000 instead of 0.97004"),
        *[("max_accuracy_drop", 0.03, ""), ("min_accuracy", 0.96, ""), ("max_cost", 0.3, "")],
        *[("max_accuracy_drop", 0.02, ""), ("min_accuracy", 0.97, ""), ("max_cost", 0.2, "")],
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


def chosen_for(kind, value, collect, names=("learned", "margin")):
    net = lived_in(zoo.eenet("eenet8", num_classes=4, input_shape=(1, 12, 12), criterion="entropy"), 1)
    held_out = SimpleNamespace(outputs=collect)
    return net, choices.choose(net, held_out, names, kind, value, None, 64, lambda *step: None)


@pytest.mark.parametrize(("kind", "value"), [("max_cost", 0.6), ("min_accuracy", 0.7)])
def test_the_network_gets_the_best_criterion_and_points_of_its_front(kind, value):
    outputs, labels = make_outputs(257, 3, 0)
    net, choice = chosen_for(kind, value, lambda *_: (outputs, labels))
    assert choice.chosen == {
        name: calibrate(outputs, labels, net.cost, name, **{kind: value}) for name in ("learned", "margin")
    }
    best = choices.best_criterion(choice.chosen, kind)
    assert choice.net.criterion.name == best
    assert choice.net.thresholds.tolist() == pytest.approx(choice.chosen[best].thresholds)
    assert net.criterion.name == "entropy"
    # The others are of the same criterion, by ascending cost, and not far below the final exit.
    front = {point.thresholds: point for point in pareto_front(outputs, labels, net.cost, best)}
    points = [front[thresholds] for thresholds in choice.others]
    assert 2 <= len(points) <= choices.CURVE_POINTS
    assert [point.cost for point in points] == sorted(point.cost for point in points)
    final = exit_quality(outputs[-1:], labels)[0].accuracy
    assert all(point.accuracy > final - choices.CURVE_DROP for point in points)


def test_a_criterion_that_cannot_keep_the_budget_is_left_out():
    outputs, labels = make_outputs(31, 3, 0)
    outputs[0].confidence_logit[:] = float("nan")
    _, choice = chosen_for("max_cost", 0.6, lambda *_: (outputs, labels))
    assert (list(choice.chosen), list(choice.impossible)) == (["margin"], ["learned"])
    assert choice.net.criterion.name == "margin"


def test_missing_images_are_no_reason_not_to_measure():
    def collect(*_):
        raise FileNotFoundError("no images")

    with pytest.raises(FileNotFoundError, match="no images; or keep the network's thresholds: --own-thresholds"):
        chosen_for("max_cost", 0.6, collect)
