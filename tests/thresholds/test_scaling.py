"""Temperatures and Platt scaling, against SciPy's optimum and against the network they are folded into."""

import dataclasses

import numpy as np
import pytest
import torch
from made_outputs import costs_of, make_outputs
from networks import images, lived_in
from scipy import optimize

from eefast import ExitOutput, zoo
from eefast.thresholds import evaluation, scaling
from eefast.thresholds.calibration import pareto_front
from eefast.thresholds.outputs import collect


def test_scaling_is_the_optimum_that_scipy_finds() -> None:
    outputs, labels = make_outputs(257, 3, 1)
    # Three times too sure of itself, and a row that is right about what is wrong.
    outputs[1] = outputs[1]._replace(logits=3 * outputs[1].logits, confidence_logit=-outputs[1].confidence_logit)
    found = scaling.fit_scaling(outputs, labels)
    for i, out in enumerate(outputs):
        logits, z = out.logits.double().numpy(), out.confidence_logit.double().numpy()
        rows, right = np.arange(257), (out.logits.argmax(1) == labels).numpy()

        def nll(t, logits=logits, rows=rows):
            x = logits / np.exp(t)
            return np.mean(np.log(np.exp(x).sum(1)) - x[rows, labels.numpy()])

        def line_nll(p, z=z, right=right):
            target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
            x = p[0] * z + p[1]
            return np.mean(np.log1p(np.exp(x)) - target * x)

        assert np.log(found.temperature[i]) == pytest.approx(optimize.minimize_scalar(nll).x, abs=1e-4)
        line = optimize.minimize(line_nll, [1.0, 0.0], tol=1e-10).x
        assert (found.slope[i], found.offset[i]) == pytest.approx(line, abs=1e-3)
    assert found.slope[1] < 0 < found.slope[0]


def test_scaling_keeps_labels_and_lowers_calibration_errors() -> None:
    outputs, labels = make_outputs(3000, 3, 1)
    outputs = [out._replace(logits=4 * out.logits) for out in outputs]
    after = scaling.scaled(outputs, scaling.fit_scaling(outputs, labels))
    for one, two in zip(outputs, after, strict=True):
        assert torch.equal(one.logits.argmax(1), two.logits.argmax(1))
        assert torch.equal(two.confidence, torch.sigmoid(two.confidence_logit))
    before, after = (evaluation.exit_quality(o, labels) for o in (outputs, after))
    for one, two in zip(before, after, strict=True):
        assert two.probability_error < 0.5 * one.probability_error
        assert two.confidence_error < 0.5 * one.confidence_error
    # The order of the learned confidences stays, so its front does.
    points = [
        np.array([(f.accuracy, f.cost) for f in pareto_front(o[1:], labels, costs_of(2))])
        for o in (outputs, scaling.scaled(outputs, scaling.fit_scaling(outputs, labels)))
    ]
    assert points[0] == pytest.approx(points[1])


def test_all_right_and_all_wrong_stay_finite() -> None:
    outputs, labels = make_outputs(31, 2, 0)
    perfect = torch.nn.functional.one_hot(labels, 4).float()
    outputs = [outputs[0]._replace(logits=perfect), outputs[1]._replace(logits=-perfect)]
    found = scaling.fit_scaling(outputs, labels)
    assert found.temperature == pytest.approx((np.exp(-3), np.exp(3)), rel=0.05)
    assert torch.tensor([found.slope, found.offset]).isfinite().all()


def test_folded_scaling_answers_as_scaled_outputs() -> None:
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 0)
    x, labels = images(31, (1, 12, 12)), torch.arange(31) % 10
    outputs, _ = collect(net, [(x, labels)])
    fitted = scaling.fit_scaling(outputs, labels)
    fitted = dataclasses.replace(fitted, bias=torch.randn(3, 10, generator=torch.Generator().manual_seed(0)).tolist())
    scaling.fold_scaling(net, fitted)
    expected = scaling.scaled([ExitOutput(*(p.double() for p in out)) for out in outputs], fitted)
    again, _ = collect(net, [(x, labels)])
    for one, two in zip(expected, again, strict=True):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-5)
    net.heads[1].confidence = torch.nn.Identity()
    weight = net.heads[0].classifier.weight.clone()
    with pytest.raises(ValueError, match="head 1 has no linear layers"):
        scaling.fold_scaling(net, fitted)
    assert torch.equal(weight, net.heads[0].classifier.weight)


def test_nothing_to_fit_is_said() -> None:
    outputs, labels = make_outputs(3, 2, 0)
    with pytest.raises(ValueError, match="exit 0 has 0 samples"):
        scaling.fit_scaling([ExitOutput(*(part[:0] for part in o)) for o in outputs], labels[:0])
    outputs[1].logits[0, 0] = float("nan")
    with pytest.raises(ValueError, match="exit 1 has 3 samples, or outputs that are not finite"):
        scaling.fit_scaling(outputs, labels)
