"""Thresholds from cached outputs, against trying everything and against the network itself."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eefast import ExitOutput, criteria, zoo
from eefast.calibrate import calibrate, collect, outcome

COST = torch.tensor([0.2, 0.5, 1.0])


def make_outputs(n: int, exits: int, seed: int, rounded: bool = False) -> tuple[list[ExitOutput], torch.Tensor]:
    """Exits that get better with depth, and confidences that know a little about it."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (n,), generator=random)
    outputs = []
    for i in range(exits):
        logits = torch.randn(n, 4, generator=random) + (1.0 + i) * torch.nn.functional.one_hot(labels, 4)
        z = torch.randn(n, generator=random) + 2 * (logits.argmax(1) == labels)
        logits, z = (logits.round(), z.round()) if rounded else (logits, z)
        outputs.append(ExitOutput(logits, torch.sigmoid(z), z))
    return outputs, labels


def looped(outputs, labels, cost, criterion, thresholds) -> tuple[float, float]:
    """Sample by sample: the first exit whose float32 confidence is beyond its threshold."""
    rule = criteria.get(criterion)
    values = [rule.confidence(o.logits, o.confidence_logit).numpy() for o in outputs]
    right = spent = 0.0
    for row in range(len(labels)):
        taken = len(outputs) - 1
        for i in reversed(range(len(outputs) - 1)):
            t = np.float32(thresholds[i])
            if values[i][row] > t if rule.comparison == ">" else values[i][row] < t:
                taken = i
        right += int(outputs[taken].logits[row].argmax()) == int(labels[row])
        spent += float(cost[taken])
    return right / len(labels), spent / len(labels)


def every_point(outputs, labels, criterion) -> list[tuple[float, float]]:
    """Accuracy and cost for all combinations of distinguishable thresholds."""
    rule = criteria.get(criterion)
    grids = []
    for out in outputs[:-1]:
        seen = np.unique(rule.confidence(out.logits, out.confidence_logit).double().numpy())
        grids.append([seen[0] - 1, *((seen[:-1] + seen[1:]) / 2), seen[-1] + 1])
    values = [rule.confidence(o.logits, o.confidence_logit).double().numpy() for o in outputs[:-1]]
    right = np.stack([(o.logits.argmax(1) == labels).numpy() for o in outputs])
    points = []
    for thresholds in itertools.product(*grids):
        taken = np.full(len(labels), len(outputs) - 1)
        for i in reversed(range(len(grids))):
            beyond = values[i] > thresholds[i] if rule.comparison == ">" else values[i] < thresholds[i]
            taken[beyond] = i
        points.append((right[taken, np.arange(len(labels))].mean(), COST.double().numpy()[taken].mean()))
    return points


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    criterion=st.sampled_from(list(criteria.CRITERIA)),
    rounded=st.booleans(),
    bound=st.floats(0.1, 1.0),
    by_cost=st.booleans(),
)
def test_one_early_exit_is_exact(n, seed, criterion, rounded, bound, by_cost) -> None:
    outputs, labels = make_outputs(n, 2, seed, rounded)
    points = every_point(outputs, labels, criterion)
    if by_cost:
        feasible = [accuracy for accuracy, cost in points if cost <= bound + 1e-9]
        wanted = {"max_cost": bound}
    else:
        feasible = [-cost for accuracy, cost in points if accuracy >= bound - 1e-9]
        wanted = {"min_accuracy": bound}
    if not feasible:
        with pytest.raises(ValueError, match=r"cannot be kept; the nearest is accuracy"):
            calibrate(outputs, labels, COST[:2], criterion, **wanted)
        return
    found = calibrate(outputs, labels, COST[:2], criterion, **wanted)
    assert (found.accuracy if by_cost else -found.cost) == pytest.approx(max(feasible))


@pytest.mark.parametrize("criterion", criteria.CRITERIA)
@pytest.mark.parametrize("seed", range(3))
def test_two_early_exits(criterion: str, seed: int) -> None:
    outputs, labels = make_outputs(13, 3, seed)
    points = every_point(outputs, labels, criterion)
    for bound in (0.6, 0.7, 0.8):
        feasible = [cost for accuracy, cost in points if accuracy >= bound - 1e-9]
        if not feasible:
            with pytest.raises(ValueError, match="cannot be kept"):
                calibrate(outputs, labels, COST, criterion, min_accuracy=bound)
            continue
        found = calibrate(outputs, labels, COST, criterion, min_accuracy=bound)
        assert found.accuracy >= bound - 1e-9
        assert min(feasible) - 1e-9 <= found.cost <= min(feasible) + 0.1
        assert looped(outputs, labels, COST, criterion, found.thresholds) == pytest.approx((found.accuracy, found.cost))


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


def test_nan_confidence_never_leaves() -> None:
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
    net = zoo.eenet("eenet8", input_shape=(1, 28, 28))
    with pytest.raises(ValueError, match="batches is empty"):
        collect(net, [])


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
