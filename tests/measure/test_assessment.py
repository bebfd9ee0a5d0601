"""An assessment: figures that one image at a time gives too, and a verdict that follows from its rows."""

import copy

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds
from runtime_stages import stage

from eefast import EarlyExitNet, ops, quantize, zoo
from eefast.heads import ExitHead
from eefast.measure import assessment
from eefast.result import ExitOutput
from eefast.rules import PythonRule
from eefast.thresholds.outputs import by_thresholds

SIZES = (1, 9)


@pytest.fixture(scope="module")
def found():
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    x = images(41, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    other = [float("inf"), float(net.thresholds[1])]
    labels = torch.arange(41) % 10
    steps = []
    result = assessment.assess(
        net,
        list(zip(x.split(7), labels.split(7), strict=True)),
        batch_sizes=SIZES,
        others=[other],
        seconds=0,
        progress=lambda what, done, total: steps.append((what, done == total)),
    )
    return net, other, x, labels, result, steps


def accuracy(answer, labels):
    return accuracy_of(answer.labels, labels)


def accuracy_of(found, labels):
    return pytest.approx(float((found == labels).double().mean()))


def test_accuracy_cost_and_exits_are_those_of_one_by_one(found):
    net, other, x, labels, result, steps = found
    alone = one_by_one(net, x)
    assert result.early.accuracy == accuracy(alone, labels)
    assert result.early.mean_cost == pytest.approx(float(alone.cost.mean()))
    exits = [right + wrong for right, wrong in zip(result.early.right, result.early.wrong, strict=True)]
    assert exits == alone.exit_index.bincount(minlength=3).tolist()
    assert result.criteria == {"learned": (result.early.accuracy, pytest.approx(result.early.mean_cost))}
    final = one_by_one(net.with_criterion("learned", [float("inf")] * 2), x)
    assert result.plain_accuracy == accuracy(final, labels)
    (point,) = result.curve
    there = one_by_one(net.with_criterion("learned", other), x)
    assert (point.accuracy, point.mean_cost) == (accuracy(there, labels), pytest.approx(float(there.cost.mean())))
    for row in result.rows:
        answer = final if row.criterion is None or row.name.endswith(", exits off") else alone
        assert row.exits == tuple(answer.exit_index.bincount(minlength=3).tolist())
        assert row.accuracy == accuracy(answer, labels)
        assert (row.images, row.flips) == (41, 0)
    assert {what for what, done in steps if done} == {"checking answers", "timing, batch 1", "timing, batch 9"}


@pytest.mark.parametrize("size", SIZES)
def test_all_ways_are_there_or_said_to_be_missing(found, size):
    result = found[4]
    engines = [name for name in assessment.ENGINES if name != "resident" or not ops.CPP_MISSING]
    onnx = [] if "ONNX Runtime" in result.left_out else ["plain, ONNX Runtime"]
    names = [row.name for row in result.rows if row.batch_size == size]
    both = [name for engine in engines for name in (engine, f"{engine}, exits off")]
    assert names == ["plain, PyTorch", *onnx, assessment.LOOP, *both]
    assert "--compile" in result.left_out["torch.compile"]
    assert ("resident" in result.left_out) == bool(ops.CPP_MISSING)
    assert result.auto in engines


@pytest.mark.parametrize("size", SIZES)
def test_verdicts_follow_from_the_rows(found, size):
    result = found[4]
    verdict = dict(zip(SIZES, result.verdicts, strict=True))[size]
    rows = {row.name: row for row in result.rows if row.batch_size == size}
    assert rows[verdict.static].criterion is None
    # Measured against itself.
    assert rows[verdict.static].speedup == rows[verdict.static].realised_ratio == 1
    assert all(row.speedup < 1.5 for row in rows.values() if row.criterion is None)
    best = max((rows[name] for name in assessment.ENGINES if name in rows), key=lambda row: row.images_per_s)
    assert (verdict.engine, verdict.batch_size) == (best.name, size)
    assert verdict.speedup[1] == best.speedup
    assert verdict.over_loop == best.images_per_s / rows[assessment.LOOP].images_per_s
    off = rows[f"{best.name}, exits off"]
    assert (verdict.by_engine, verdict.by_exits) == (off.speedup, best.images_per_s / off.images_per_s)
    assert off.mean_cost == 1


@torch.no_grad()
def test_accuracy_is_that_of_answers_in_the_dtype_that_is_timed():
    dtype = torch.bfloat16
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12)), 3)
    for head in net.heads:
        head.classifier.bias.add_(30)  # which changes no answer in float32, and many where logits are rounded
    x = images(301, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    own, other = net.thresholds.tolist(), [float("inf"), float(net.thresholds[1])]
    outputs = [
        ExitOutput(*(part.float() for part in out)) for out in copy.deepcopy(net).to(dtype).all_exits(x.to(dtype))
    ]
    labels = by_thresholds(outputs, net, "learned", own).labels
    found = assessment.assess(net, [(x, labels)], batch_sizes=(9,), others=[other], dtype=dtype, seconds=0)
    assert found.early.accuracy == found.criteria["learned"][0] == 1
    assert found.plain_accuracy == accuracy_of(outputs[-1].logits.argmax(1), labels)
    assert found.curve[0].accuracy == accuracy_of(by_thresholds(outputs, net, "learned", other).labels, labels)
    assert not torch.equal(net(x).labels, labels)


def test_a_rule_in_python_is_assessed():
    rule = PythonRule("streak", lambda i, x, z, *before: (x, z + i))
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), criterion=rule), 3)
    x, labels = images(21, (1, 12, 12)), torch.arange(21) % 10
    result = assessment.assess(net, [(x, labels)], batch_sizes=(4,), seconds=0)
    assert result.criteria == {"streak": (result.early.accuracy, pytest.approx(result.early.mean_cost))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_on_rows_are_assessed(dtype):
    net = lived_in(zoo.eenet("eenet20-1d", 2, input_shape=(3, 64), criterion="max_probability"), 1)
    x, labels = images(21, (3, 1, 64)).squeeze(2), torch.arange(21) % 10
    spread_thresholds(net, x, 0.4)
    result = assessment.assess(net, [(x, labels)], batch_sizes=(4,), dtype=dtype, seconds=0)
    assert {"plain, PyTorch", assessment.LOOP, "compact"} <= {row.name for row in result.rows}
    if dtype == torch.float32:
        assert result.early.accuracy == accuracy(one_by_one(net, x), labels)


def test_stages_in_int8_of_other_libraries_are_one_more_way():
    shape = (3, 12, 14)
    net = lived_in(EarlyExitNet([stage("mobile")], [ExitHead("pool", (6, 12, 14), 4, shape)], input_shape=shape), 1)
    x, labels = images(16, shape), torch.arange(16) % 4
    made = assessment.InInt8(quantize(net, x), x)
    result = assessment.assess(net, [(x, labels)], batch_sizes=(5,), seconds=0, in_int8=made)
    (row,) = [row for row in result.rows if row.name == "INT8, compact"]
    answer = one_by_one(made.net, x)
    assert row.accuracy == accuracy(answer, labels)
    assert row.other_classes == float((answer.labels != one_by_one(net, x).labels).double().mean())
