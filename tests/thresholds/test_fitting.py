"""Fitted rules: SciPy's optimum where more parameters pay, the largest probability's own number where they do not."""

import numpy as np
import pytest
import torch
from made_outputs import make_outputs
from scipy import optimize

from eefast import ExitOutput, rules
from eefast.thresholds import fitting
from eefast.thresholds.outputs import carried
from eefast.thresholds.scaling import scaled


def nll(logits, labels):
    x = np.asarray(logits, np.float64)
    return np.mean(np.log(np.exp(x - x.max(1, keepdims=True)).sum(1)) + x.max(1) - x[np.arange(len(x)), labels])


def test_temperature_bias_and_weight_are_the_optimum_that_scipy_finds() -> None:
    # Exits whose errors are independent know more together.
    outputs, labels = make_outputs(257, 3, 1)
    outputs[0] = outputs[0]._replace(logits=3 * outputs[0].logits)
    rule, scaling = fitting.fit_rule(outputs, labels)
    first, second = (out.logits.double().numpy() for out in outputs[:2])

    def answer(p, logits, before=None):
        found = logits / np.exp(p[0]) + p[1:5]
        return found if before is None else found + p[5] * before

    def found_by_scipy(logits, before=None):
        def loss(p):
            return nll(answer(p, logits, before), labels.numpy()) + (unbounded(p) ** 2).sum() / (2 * 257)

        return optimize.minimize(loss, np.zeros(5 if before is None else 6), tol=1e-10).x

    def unbounded(p):  # the prior is that of what is minimised, whose temperature has bounds
        return np.concatenate([[3 * np.arctanh(p[0] / 3)], p[1:]])

    p = found_by_scipy(first)
    assert scaling.temperature[0] == pytest.approx(np.exp(p[0]), abs=1e-3)
    assert scaling.bias[0] == pytest.approx(p[1:], abs=1e-3)
    p = found_by_scipy(second, answer(p, first))
    assert (scaling.temperature[1], rule.rows[1][-1]) == pytest.approx((np.exp(p[0]), p[5]), abs=1e-3)
    assert rule.rows[1][-1] > 0.3
    assert rule.rows[2] == rules.carried([0, 0, 0]).rows[2]
    assert (scaling.temperature[2], scaling.slope, scaling.offset) == (1.0, (1.0,) * 3, (0.0,) * 3)
    assert not any(scaling.bias[2])


def test_where_nothing_pays_nothing_changes() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(431, 4, generator=random) * 2
    labels = torch.multinomial(logits.softmax(1), 1, generator=random).flatten()
    z = torch.randn(431, generator=random)
    outputs = [ExitOutput(logits, torch.sigmoid(z), z)] * 3
    rule, scaling = fitting.fit_rule(outputs, labels)
    assert rule == rules.carried([0.0] * 3)
    assert scaling.temperature == (1.0,) * 3
    assert scaling.bias == ((0.0,) * 4,) * 3
    assert fitting.fit_weights(outputs, labels).rows == rules.stateless("max_probability", 2).rows


@pytest.mark.parametrize("seed", range(2))
def test_no_exit_fits_the_samples_worse_than_before(seed) -> None:
    outputs, labels = make_outputs(61, 3, seed)
    outputs[1] = outputs[1]._replace(logits=outputs[1].logits / 5 + torch.arange(4))
    rule, scaling = fitting.fit_rule(outputs, labels)
    for before, after in zip(outputs, carried(scaled(outputs, scaling), rule), strict=True):
        assert nll(after.logits, labels.numpy()) <= nll(before.logits, labels.numpy()) + 1e-7
    assert any(scaling.bias[1])


def test_few_samples_of_many_classes_get_no_bias() -> None:
    outputs, labels = make_outputs(79, 2, 0, classes=8)
    outputs = [out._replace(logits=5 * out.logits) for out in outputs]
    _, scaling = fitting.fit_rule(outputs, labels)
    assert scaling.temperature[0] > 2
    assert not any(map(any, scaling.bias))


def test_weights_are_the_optimum_that_scipy_finds() -> None:
    outputs, labels = make_outputs(257, 2, 3)
    rule = fitting.fit_weights(outputs, labels)
    for out, row in zip(outputs, rule.rows, strict=True):
        probs = out.logits.double().softmax(1).numpy()
        z, top = out.confidence_logit.double().numpy(), np.sort(probs)[:, ::-1]
        numbers = np.stack(
            [
                1 / (1 + np.exp(-z)),
                top[:, 0],
                (probs * np.log(probs)).sum(1),
                top[:, 0] - top[:, 1],
                np.log1p(np.exp(z)),
            ],
            axis=1,
        )
        standard = (numbers - numbers.mean(0)) / numbers.std(0, ddof=1)
        right = (out.logits.argmax(1) == labels).numpy()

        def loss(p, standard=standard, right=right):
            s = standard @ p[:5] + p[5]
            return np.mean(np.logaddexp(0, s) - right * s) + (p**2).sum() / (2 * 257)

        best = optimize.minimize(loss, np.zeros(6), tol=1e-10).x
        got = numbers @ np.array(row[:5]) + row[5]
        assert got == pytest.approx(standard @ best[:5] + best[5], abs=2e-3)
        assert row[6:] == (0, 0, 0)


@pytest.mark.parametrize("scale", [1, 40])
def test_log_odds_are_those_of_the_largest_probability(scale) -> None:
    logits = scale * torch.randn(31, 7, generator=torch.Generator().manual_seed(0))
    probs = logits.double().softmax(1)
    others = probs.sort(1).values[:, :-1].sum(1)
    torch.testing.assert_close(fitting.log_odds(logits).double(), (probs.amax(1) / others).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fit", [fitting.fit_rule, fitting.fit_weights])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o, y: ([ExitOutput(*(p[:1] for p in out)) for out in o], y[:1]), "1 samples of 1 classes; a fit needs"),
        (lambda o, y: (o, torch.full_like(y, 2)), "31 samples of 1 classes; a fit needs at least 2"),
        (lambda o, y: ([o[0], o[1]._replace(logits=o[1].logits / 0)], y), "exit 1 has outputs that are not finite"),
        (lambda o, y: ([o[0]._replace(confidence_logit=y / 0), o[1]], y), "exit 0 has outputs that are not finite"),
    ],
    ids=["one sample", "one class", "logits", "confidences"],
)
def test_what_cannot_be_fitted_is_refused(fit, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(*change(*make_outputs(31, 2, 0)))
