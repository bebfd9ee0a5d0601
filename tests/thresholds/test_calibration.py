"""Thresholds under a bound, against the network itself, and files of chosen thresholds."""

import json

import pytest
import torch
from made_outputs import looped, make_outputs
from networks import lived_in

import eefast
from eefast import ExitOutput, criteria, zoo
from eefast.thresholds import calibration
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.outputs import collect, outcome

COST = torch.tensor([0.2, 0.5, 1.0])


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("rounded", [False, True])
def test_no_confidence_ties_with_its_threshold(criterion: str, rounded: bool) -> None:
    outputs, labels = make_outputs(257, 4, 0, rounded)
    cost = torch.tensor([0.1, 0.3, 0.6, 1.0])
    for bound in (0.2, 0.35, 0.5, 1.0):
        found = calibrate(outputs, labels, cost, criterion, max_cost=bound)
        assert found.cost <= bound + 1e-9
        for out, threshold in zip(outputs, found.thresholds, strict=False):
            values = criteria.get(criterion).confidence(out.logits, out.confidence_logit)
            assert not (values == torch.tensor(threshold, dtype=torch.float32)).any()
        expected = looped(outputs, labels, cost, criterion, found.thresholds)
        assert (found.accuracy, found.cost) == pytest.approx(expected)
        assert outcome(outputs, labels, cost, criterion, found.thresholds) == pytest.approx(expected)


def test_nan_confidence_never_exits() -> None:
    outputs, labels = make_outputs(31, 2, 0)
    outputs[0].confidence_logit[:5] = float("nan")
    found = calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 5 / 31 + 1e-6)
    assert found.cost == pytest.approx(0.2 + 0.3 * 5 / 31)
    with pytest.raises(ValueError, match="cannot be kept"):
        calibrate(outputs, labels, COST[:2], max_cost=0.2 + 0.3 * 4 / 31)


def test_bad_arguments() -> None:
    outputs, labels = make_outputs(3, 3, 0)
    for both in ({}, {"min_accuracy": 0.5, "max_cost": 0.5}):
        with pytest.raises(ValueError, match="exactly one of them"):
            calibrate(outputs, labels, COST, **both)
    with pytest.raises(ValueError, match="criterion='best' is unknown"):
        calibrate(outputs, labels, COST, "best", max_cost=0.5)
    with pytest.raises(ValueError, match="0 samples"):
        calibrate([ExitOutput(*(part[:0] for part in o)) for o in outputs], labels[:0], COST, max_cost=0.5)
    with pytest.raises(ValueError, match="3 samples, 0 early exits"):
        calibrate(outputs[-1:], labels, COST[-1:], max_cost=0.5)
    outputs[0].confidence_logit[:] = float("nan")
    with pytest.raises(ValueError, match="no confidence that is a number"):
        calibrate(outputs, labels, COST, max_cost=0.5)


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


def test_saved_thresholds_load_with_their_criterion(tmp_path) -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    one = calibration.Calibration("margin", (0.25, 0.75), 0.9, 0.5)
    two = calibration.Calibration("learned", (0.5, 0.125), 0.9, 0.5)
    for chosen, kept in (({"margin": one, "learned": two}, two), ({"margin": one}, one)):
        calibration.save_thresholds(net, tmp_path, chosen)
        loaded = eefast.load(tmp_path)
        assert loaded.criterion.name == kept.criterion
        assert loaded.thresholds.tolist() == list(kept.thresholds)
        assert json.loads((tmp_path / "thresholds.json").read_text()) == {
            name: list(c.thresholds) for name, c in chosen.items()
        }
        assert not list(tmp_path.glob("*.partial"))
