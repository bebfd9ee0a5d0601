"""Accuracy, cost, exits and calibration errors, against loops over single images."""

import math

import numpy as np
import pytest
import torch
from networks import images, lived_in, spread_thresholds

from eefast import ExitOutput, ExitResult, zoo
from eefast.thresholds import evaluation
from eefast.thresholds.outputs import collect, collect_answers


@pytest.fixture(scope="module")
def case():
    """A network, 31 images that use all its exits, labels that lack a class, and what all exits say."""
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 1)
    x = images(31, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    labels = torch.randint(9, (31,), generator=torch.Generator().manual_seed(1))
    labels[::2] = net(x).labels[::2].clamp(max=8)
    outputs, _ = collect(net, [(x, labels)])
    return net, x, labels, outputs


def test_figures_are_those_of_a_loop(case):
    net, x, labels, _ = case
    result, cached = collect_answers(net, zip(x.split(7), labels.split(7), strict=True))
    assert torch.equal(cached, labels)
    assert torch.equal(result.exit_index, net(x).exit_index)
    found = evaluation.evaluate(result, labels, net)
    exits = range(net.num_exits + 1)
    taken, right = result.exit_index.tolist(), (result.labels == labels).tolist()
    assert len(set(taken)) == 3
    assert {True, False} == set(right)
    assert found.images == 31
    assert found.accuracy == sum(right) / 31
    assert found.mean_cost == pytest.approx(sum(float(net.cost[t]) for t in taken) / 31, abs=1e-12)
    assert found.mean_path_cost == pytest.approx(sum(float(net.path_cost[t]) for t in taken) / 31, abs=1e-12)
    assert found.mean_path_cost > found.mean_cost
    assert found.right == tuple(sum(t == i and r for t, r in zip(taken, right, strict=True)) for i in exits)
    assert found.wrong == tuple(sum(t == i and not r for t, r in zip(taken, right, strict=True)) for i in exits)
    for label in range(10):
        rows = [row for row in range(31) if int(labels[row]) == label]
        assert found.class_exits[label] == tuple(sum(taken[row] == i for row in rows) for i in exits)
        accuracy = sum(right[row] for row in rows) / len(rows) if rows else None
        assert found.class_accuracy[label] == accuracy
    assert found.class_accuracy[9] is None


@pytest.mark.parametrize("n", [1, 3, 257])
@pytest.mark.parametrize("bins", [1, 5, 15])
def test_calibration_error_is_that_of_a_loop_over_bins(n, bins):
    random = torch.Generator().manual_seed(n)
    p, right = torch.rand(n, generator=random), torch.rand(n, generator=random) < 0.7
    p[0] = 1.0
    expected = 0.0
    for low in np.arange(bins) / bins:
        inside = [k for k in range(n) if low < float(p[k]) <= low + 1 / bins + 1e-12]
        if inside:
            gap = np.mean([float(p[k]) for k in inside]) - np.mean([float(right[k]) for k in inside])
            expected += len(inside) / n * abs(gap)
    assert evaluation.expected_calibration_error(p, right, bins) == pytest.approx(expected, abs=1e-9)


def test_calibration_error_at_its_ends():
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    assert evaluation.expected_calibration_error(torch.ones(4), yes) == 0
    assert evaluation.expected_calibration_error(torch.ones(4), no) == 1
    assert evaluation.expected_calibration_error(torch.zeros(4), no) == 0
    assert evaluation.expected_calibration_error(torch.full((4,), math.nan), yes) == 1
    assert evaluation.expected_calibration_error(torch.empty(0), yes[:0]) == 0
    # Errors of opposite sign must not cancel between bins.
    p = torch.tensor([0.25, 0.25, 0.75, 0.75])
    assert evaluation.expected_calibration_error(p, p < 0.5) == 0.75
    assert evaluation.expected_calibration_error(p, p < 0.5, bins=1) == 0


def test_every_exit_is_judged_on_all_images(case):
    _, _, labels, outputs = case
    quality = evaluation.exit_quality(outputs, labels)
    for q, out in zip(quality, outputs, strict=True):
        right = out.logits.argmax(dim=1) == labels
        assert q.accuracy == pytest.approx(right.double().mean().item())
        error = evaluation.expected_calibration_error
        assert q.probability_error == pytest.approx(error(out.logits.double().softmax(1).amax(1), right), abs=1e-6)
        assert q.confidence_error == pytest.approx(error(out.confidence_logit.double().sigmoid(), right), abs=1e-6)


def test_flips_are_counted_at_the_exit_where_runs_part(case):
    net, x, _, outputs = case
    reference = net(x)
    assert evaluation.count_flips(reference, reference, outputs, net) == evaluation.Flips(0, 0.0)
    distances = []
    other = reference.exit_index.clone()
    for row, to in ((3, 2), (20, 0)):
        other[row] = (to + 1) % 3 if reference.exit_index[row] == to else to
        parted = min(int(other[row]), int(reference.exit_index[row]))
        confidence = torch.sigmoid(outputs[parted].confidence_logit[row])
        distances.append(abs(float(confidence) - float(net.thresholds[parted])))
    found = evaluation.count_flips(reference._replace(exit_index=other), reference, outputs, net)
    assert found.count == 2
    assert found.distance == pytest.approx(max(distances), abs=1e-7)
    assert distances[0] != distances[1]


def test_bad_arguments(case):
    net, x, labels, _ = case
    result = net(x)
    with pytest.raises(ValueError, match="31 answers and 3 labels"):
        evaluation.evaluate(result, labels[:3], net)
    empty = ExitResult(*(part[:0] for part in result))
    with pytest.raises(ValueError, match="0 answers and 0 labels"):
        evaluation.evaluate(empty, labels[:0], net)


@pytest.mark.parametrize("off", [2, -1])
def test_labels_of_other_classes_are_refused(case, off):
    net, x, labels, _ = case
    with pytest.raises(ValueError, match="the network has 10 classes"):
        evaluation.evaluate(net(x), labels + off, net)


def test_nan_confidence_is_no_confidence():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    out = ExitOutput(logits, torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 99.0]))
    (quality,) = evaluation.exit_quality([out], torch.tensor([1, 1]))
    assert quality.confidence_error == 0
