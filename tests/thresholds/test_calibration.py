"""Thresholds under a bound, against the network itself, and files of chosen thresholds."""

import json

import pytest
import torch
from made_outputs import looped, make_outputs
from networks import lived_in

import eefast
from eefast import criteria, zoo
from eefast.thresholds import calibration
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.outputs import collect, outcome

COST = torch.tensor([0.2, 0.5, 1.0])


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("bound", [0.2, 0.35, 0.5, 1.0])
@pytest.mark.sampled(8)
def test_no_confidence_ties_with_its_threshold(criterion: str, rounded: bool, bound: float) -> None:
    outputs, labels = make_outputs(257, 4, 0, rounded)
    cost = torch.tensor([0.1, 0.3, 0.6, 1.0])
    found = calibrate(outputs, labels, cost, criterion, max_cost=bound)
    assert found.cost <= bound + 1e-9
    for out, threshold in zip(outputs, found.thresholds, strict=False):
        values = criteria.get(criterion).confidence(out.logits, out.confidence_logit)
        assert not (values == torch.tensor(threshold, dtype=torch.float32)).any()
    expected = looped(outputs, labels, cost, criterion, found.thresholds)
    assert (found.accuracy, found.cost) == pytest.approx(expected)
    assert outcome(outputs, labels, cost, criterion, found.thresholds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "no bound is given"),
        ({"min_accuracy": 0.5, "max_accuracy_drop": 0.5}, "both bound the accuracy; give one of them"),
        ({"max_accuracy_drop": -0.1}, r"max_accuracy_drop=-0\.1 must be in 0 … 1"),
        ({"max_cost": float("nan")}, "max_cost=nan must be in 0 … 1"),
    ],
)
def test_bounds_that_say_nothing_are_refused(bounds: dict, message: str) -> None:
    outputs, labels = make_outputs(3, 3, 0)
    with pytest.raises(ValueError, match=message):
        calibrate(outputs, labels, COST, **bounds)


def test_a_drop_is_below_the_final_exit() -> None:
    outputs, labels = make_outputs(67, 3, 0)
    final = float((outputs[-1].logits.argmax(1) == labels).double().mean())
    expected = calibrate(outputs, labels, COST, min_accuracy=final - 0.1)
    assert calibrate(outputs, labels, COST, max_accuracy_drop=0.1) == expected
    assert calibrate(outputs, labels, COST, max_accuracy_drop=0.1, max_cost=expected.cost) == expected
    with pytest.raises(
        ValueError, match=r"max_accuracy_drop=0.1, max_cost=0.* cannot be kept; the nearest is accuracy"
    ):
        calibrate(outputs, labels, COST, max_accuracy_drop=0.1, max_cost=expected.cost - 0.001)


def test_without_labels_the_final_answers_are_right() -> None:
    outputs, _ = make_outputs(67, 3, 0)
    expected = calibrate(outputs, outputs[-1].logits.argmax(1), COST, max_accuracy_drop=0.1)
    assert calibrate(outputs, None, COST, max_accuracy_drop=0.1) == expected
    assert 0.9 <= expected.accuracy < 1


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_thresholds_do_in_the_network_what_was_promised(criterion: str) -> None:
    torch.manual_seed(0)
    net = zoo.eenet("eenet8", input_shape=(1, 12, 12), criterion=criterion).train()
    images, labels = torch.randn(67, 1, 12, 12), torch.randint(10, (67,))
    net(images)
    batches = [(images[:33], labels[:33]), (images[33:], labels[33:])]
    outputs, cached = collect(net, batches)
    assert net.training
    assert torch.equal(cached, labels)
    found = calibrate(outputs, labels, net.cost, criterion, max_cost=0.8)
    net.thresholds.copy_(torch.tensor(found.thresholds))
    result = net.eval()(images)
    assert (result.labels == labels).double().mean().item() == pytest.approx(found.accuracy)
    assert result.cost.double().mean().item() == pytest.approx(found.cost, abs=1e-6)
    assert len(set(result.exit_index.tolist())) > 1


@pytest.mark.parametrize(
    ("names", "kept"),
    [(("margin", "learned"), "learned"), (("margin",), "margin"), (("entropy", "margin"), "entropy")],
    ids=" ".join,
)
def test_saved_thresholds_load_with_their_criterion(tmp_path, names: tuple[str, ...], kept: str) -> None:
    """That of the network where it is among them, else the first one."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    values = {"margin": (0.25, 0.75), "learned": (0.5, 0.125), "entropy": (0.75, 0.5)}
    chosen = {name: calibration.Calibration(name, values[name], 0.9, 0.5) for name in names}
    calibration.save_thresholds(net, tmp_path, chosen)
    loaded = eefast.load(tmp_path)
    assert loaded.criterion.name == kept
    assert loaded.thresholds.tolist() == list(values[kept])
    assert json.loads((tmp_path / "thresholds.json").read_text()) == {name: list(values[name]) for name in names}
    assert not list(tmp_path.glob("*.partial"))
