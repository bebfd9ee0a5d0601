"""eefast.online.BudgetController: the mean cost stays at the target under drift, the setpoint within the path."""

import json

import pytest
import torch
from made_outputs import costs_of, looped, make_outputs

from eefast import criteria
from eefast.online import BudgetController
from eefast.result import ExitResult
from eefast.thresholds.cuts import Cuts
from eefast.thresholds.path import accurate_to_cheap

PATH = torch.tensor([[torch.inf, torch.inf], [0.9, 0.8], [0.5, 0.5], [0.2, 0.3], [-torch.inf, -torch.inf]])
COSTS = [1.0, 0.8, 0.5, 0.3, 0.2]


def made(**changes):
    return BudgetController(**{"path": PATH, "costs": COSTS, "target": 0.5, "images": 100, **changes})


def result_of(costs):
    cost = torch.as_tensor(costs, dtype=torch.float32)
    return ExitResult(torch.zeros(len(cost), 3), torch.zeros(len(cost), dtype=torch.int64), torch.ones(len(cost)), cost)


def answered(controller, images, drift, random):
    """Answers of two exits and a final one, whose confidences lie lower by `drift`: more images go on."""
    confidence = torch.rand(images, 2, generator=random) - drift
    exits = torch.cat([confidence > controller.thresholds, torch.ones(images, 1, dtype=torch.bool)], dim=1)
    return result_of(torch.tensor([0.2, 0.5, 1.0])[exits.int().argmax(dim=1)])


def fine_path():
    """Rows of one threshold for both exits, and their mean costs: 0.2, 0.5, 1.0 for uniform confidences."""
    t = torch.linspace(1, 0, 101)
    return torch.stack([t, t], dim=1), (1 - t) * 0.2 + t * (1 - t) * 0.5 + t * t


@pytest.mark.parametrize("drift", [0.0, 0.3, -0.3, 0.45])
def test_the_mean_cost_reaches_the_target_after_a_drift(drift):
    """Within 0.01 over the last 10,000 images; fixed thresholds miss it by more wherever there is a drift."""
    path, costs = fine_path()
    controller, random = BudgetController(path, costs, 0.5, images=500), torch.Generator().manual_seed(3)
    fixed, last, missed = BudgetController(path, costs, 0.5), [], []
    for batch in range(200):
        shift = drift * min(max((batch - 50) / 50, 0), 1)
        result = answered(controller, 101, shift, random)
        controller.update(result)
        if batch >= 100:
            last.append(result.cost.mean())
            missed.append(answered(fixed, 101, shift, random).cost.mean())
    assert float(torch.stack(last).mean()) == pytest.approx(0.5, abs=0.01)
    assert (abs(float(torch.stack(missed).mean()) - 0.5) > 0.05) == (drift != 0)


def test_the_mean_cost_differs_by_what_the_setpoint_moved():
    """The exact sum of the docstring, over batches of all sizes, as long as the setpoint is within the path."""
    path, costs = fine_path()
    controller, random = BudgetController(path, costs, 0.5, images=300), torch.Generator().manual_seed(0)
    seen = []
    for batch in range(57):
        result = answered(controller, 1 + 31 * batch % 257, 0.2 * (batch > 20), random)
        controller.update(result)
        seen.append(result.cost.double())
        assert 0.2 < controller.setpoint < 1.0
    every = torch.cat(seen)
    assert float((every - 0.5).sum()) == pytest.approx((0.5 - controller.setpoint) * 300, abs=1e-6)


@pytest.mark.parametrize(
    ("setpoint", "row"), [(1.0, 0), (0.91, 0), (0.89, 1), (0.5, 2), (0.41, 2), (0.39, 3), (0.2, 4)]
)
def test_the_row_of_the_nearest_cost_answers(setpoint, row):
    controller = made()
    controller.load_state_dict({"setpoint": setpoint})
    assert controller.row == row
    assert controller.thresholds.equal(PATH[row])


def test_an_update_moves_the_setpoint_by_its_excess():
    controller = made()
    controller.update(result_of([0.7] * 10))
    assert controller.setpoint == pytest.approx(0.5 - 0.2 * 10 / 100)
    controller.update(result_of([0.4] * 1000))  # a batch of more than `images` counts as that many
    assert controller.setpoint == pytest.approx(0.48 + 0.1)
    controller.update(result_of([]))
    assert controller.setpoint == pytest.approx(0.58)


@pytest.mark.parametrize(("cost", "end", "back"), [(1.0, 0.2, 0.25), (0.2, 1.0, 0.95)])
def test_no_windup(cost, end, back):
    """However long the target is out of reach, the setpoint stays at the end, and is back at once."""
    controller = made()
    for _ in range(1000):
        controller.update(result_of([cost] * 50))
    assert controller.setpoint == end
    controller.update(result_of([0.4 if end == 0.2 else 0.6] * 50))
    assert controller.setpoint == pytest.approx(back)


def test_the_state_goes_through_json_and_on_alike():
    path, costs = fine_path()
    one, other = (BudgetController(path, costs, 0.5, images=100) for _ in range(2))
    random = torch.Generator().manual_seed(1)
    for _ in range(7):
        one.update(answered(one, 33, 0.2, random))
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(7):
        result = answered(one, 33, 0.2, random)
        for each in (one, other):
            each.update(result)
        assert one.setpoint == other.setpoint
        assert one.thresholds.equal(other.thresholds)


def test_what_it_hands_out_and_was_given_may_be_changed():
    path = PATH.clone()
    controller = made(path=path)
    path.zero_()
    controller.thresholds.zero_()
    assert controller.thresholds.equal(PATH[2])


@pytest.mark.parametrize("criterion", ["max_probability", "entropy"])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_path_of_held_out_images_with_its_costs(criterion, labelled):
    outputs, labels = make_outputs(127, 3, 0)
    cost = costs_of(3)
    controller = BudgetController.from_outputs(outputs, labels if labelled else None, cost, criterion, 0.6)
    judged = labels if labelled else outputs[-1].logits.argmax(1)
    path = accurate_to_cheap(Cuts(outputs, judged, cost, criterion), criteria.get(criterion))
    assert controller.path.equal(path)
    for row in (0, len(path) // 2, len(path) - 1):
        expected = looped(outputs, judged, cost, criterion, path[row].tolist())[1]
        assert float(controller.costs[row]) == pytest.approx(expected)
    assert controller.costs[0] == 1.0
    assert abs(float(controller.costs[controller.row]) - 0.6) < 0.05


def test_it_keeps_the_cost_that_its_path_was_made_with():
    """Costs that count every head on the way: those of the results count one head alone."""
    outputs, labels = make_outputs(127, 3, 0)
    with_heads = costs_of(3) * 1.2
    controller = BudgetController.from_outputs(outputs, labels, with_heads, "max_probability", 0.9, images=100)
    exits = torch.tensor([0, 1, 2, 2])
    result = result_of(costs_of(3)[exits])._replace(exit_index=exits)
    controller.update(result)
    excess = float(with_heads[exits].double().mean()) - 0.9
    assert controller.setpoint == pytest.approx(0.9 - excess * 4 / 100)
    with_heads.zero_()
    before = controller.setpoint
    controller.update(result)
    assert controller.setpoint == pytest.approx(before - excess * 4 / 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": PATH[0]}, r"path has shape \(2,\)"),
        ({"path": PATH[:0], "costs": []}, r"path has shape \(0, 2\)"),
        ({"costs": COSTS[1:]}, r"costs \(4,\)"),
        ({"path": PATH * float("nan")}, "path holds a NaN"),
        ({"costs": [float("nan"), *COSTS[1:]]}, "costs holds a number that is not finite"),
        ({"target": 0.1}, r"target=0.1 is out of reach; the rows of the path cost 0.2000 … 1.0000"),
        ({"target": 1.1}, "target=1.1 is out of reach"),
        ({"target": float("nan")}, "target=nan is out of reach"),
        ({"images": 0}, "images=0 must be at least 1"),
        ({"images": float("nan")}, "images=nan must be at least 1, and finite"),
        ({"images": float("inf")}, "images=inf must be at least 1, and finite"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        made(**changes)


@pytest.mark.parametrize("target", [0.2, 1.0])
def test_the_ends_of_the_path_can_be_targets_though_costs_are_rounded(target):
    outputs, labels = make_outputs(127, 3, 0)
    for rounded in (1 - 1e-7, 1 + 1e-7):
        controller = BudgetController.from_outputs(outputs, labels, torch.tensor([0.2, 0.5, 1.0]), "margin", target)
        other = made(costs=torch.tensor(COSTS, dtype=torch.float64) * rounded, target=target)
        for each in (controller, other):
            assert float(each.costs[each.row]) == pytest.approx(each.setpoint) == pytest.approx(target)
            each.update(result_of([target]))
            assert each.setpoint == pytest.approx(target)
    with pytest.raises(ValueError, match="out of reach"):
        made(target=target + (1e-5 if target == 1.0 else -1e-5))


def test_a_setpoint_may_have_become_an_integer():
    controller = made()
    controller.load_state_dict({"setpoint": 1})
    assert (controller.row, type(controller.setpoint)) == (0, float)


@pytest.mark.parametrize(
    "state", [{}, {"setpoint": None}, {"setpoint": float("nan")}, {"setpoint": 1.5}, {"setpoint": True}]
)
def test_a_state_of_something_else_is_refused(state):
    controller = made()
    with pytest.raises(ValueError, match="is not one of this path"):
        controller.load_state_dict(state)
    assert controller.setpoint == 0.5


def test_costs_that_are_not_finite_change_nothing():
    controller = made()
    with pytest.raises(ValueError, match=r"result\.cost holds a number that is not finite"):
        controller.update(result_of([0.5, float("nan")]))
    assert controller.setpoint == 0.5
