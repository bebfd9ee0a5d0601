"""The demonstration: its rows are true, its pictures are drawn, and a wrong answer gets no speed."""

import pytest
import torch
from networks import images, lived_in, one_by_one, spread_thresholds

from eefast import ops, rules, zoo
from eefast.measure import demonstration
from eefast.thresholds.outputs import carried

WORDS = ("demo", "--images", 64, "--rounds", 2)


@pytest.fixture(scope="module")
def found():
    net = lived_in(zoo.eenet("eenet20", 2, "linear", input_shape=(1, 12, 12)), 3)
    x = images(70, (1, 12, 12))
    spread_thresholds(net, x, 0.4)
    other = net.with_criterion("margin")
    spread_thresholds(other, x, 0.3)
    labels = torch.arange(70) % 10
    steps = []
    result = demonstration.demonstrate(
        net,
        {"margin": other.thresholds.tolist()},
        x,
        labels,
        batch_size=16,
        loop_images=20,
        rounds=3,
        progress=lambda what, done, total: steps.append((what, done, total)),
    )
    return net, other, x, labels, result, steps


@pytest.mark.parametrize(("way", "n"), [("one by one (20 images)", 20), ("masked early exit, PyTorch", 70)])
def test_rows_are_those_of_one_image_at_a_time(found, way, n):
    net, _, x, labels, result, _ = found
    (row,) = (row for row in result.rows if row.name == way)
    drawn = torch.randperm(70, generator=torch.Generator().manual_seed(0))[:n]
    answer = one_by_one(net, x[drawn])
    assert row.images == n
    assert row.mean_cost == pytest.approx(float(answer.cost.mean()), rel=1e-5)
    assert row.accuracy == pytest.approx(float((answer.labels == labels[drawn]).float().mean()))
    assert list(row.exits) == answer.exit_index.bincount(minlength=3).tolist()


def test_all_ways_agree_and_speeds_are_within_their_quantiles(found):
    _, other, x, _, result, steps = found
    plain, _, masked, compact, *resident, margin = result.rows
    assert len(resident) == (ops.CPP_MISSING is None)
    for row in (masked, compact, *resident):
        assert (row.mean_cost, row.accuracy, row.exits) == (masked.mean_cost, masked.accuracy, masked.exits)
    assert margin.mean_cost == pytest.approx(float(one_by_one(other, x).cost.mean()), rel=1e-5)
    assert (plain.mean_cost, plain.realised_ratio, plain.criterion) == (1.0, 1.0, None)
    for row in result.rows:
        low, high = row.images_per_s_quantiles
        assert 0 < low <= row.images_per_s <= high
        assert row.realised_ratio > 0
    assert [a + b for a, b in zip(result.right, result.wrong, strict=True)] == list(masked.exits)
    assert {what for what, done, total in steps if done == total} == {
        "outputs of all exits",
        "checking answers",
        "timing",
    }


def test_the_sweep_goes_from_the_first_exit_to_the_last(found):
    net, _, _, _, result, _ = found
    for costs, accuracies in result.curves.values():
        assert costs[0] == pytest.approx(float(net.cost[0]), abs=0.05)
        assert costs[-1] == pytest.approx(1.0, abs=0.05)
        assert costs == sorted(costs)
        assert all(0 <= a <= 1 for a in accuracies)


@pytest.mark.parametrize("rule", [rules.patience(3), rules.PythonRule("streak", lambda i, x, z, *before: (x, z + i))])
def test_the_sweep_of_a_rule_that_carries_is_of_its_answers(rule):
    net = lived_in(zoo.eenet("eenet20", 3, "linear", input_shape=(1, 12, 12), criterion=rule), 3)
    x, labels = images(31, (1, 12, 12)), torch.arange(31) % 10
    result = demonstration.demonstrate(net, {}, x, labels, batch_size=16, loop_images=8, rounds=2)
    with torch.no_grad():
        outputs = carried(net.eval().all_exits(x), rule)
    taken = [[t] * 3 for out in outputs[:-1] for t in out.confidence.unique().tolist()]
    possible = {round(float(net(x, thresholds=t).cost.double().mean()), 5) for t in taken}
    found = {round(c, 5) for c in result.curves[net.criterion.name][0]}
    assert len(found) > 1
    if rule.name == "patience":
        assert found <= possible


def test_networks_on_rows_run_every_way():
    net = lived_in(zoo.eenet("eenet20-1d", 2, input_shape=(3, 64), criterion="max_probability"), 1)
    x, labels = images(21, (3, 1, 64)).squeeze(2), torch.arange(21) % 10
    spread_thresholds(net, x, 0.4)
    result = demonstration.demonstrate(net, {}, x, labels, batch_size=8, loop_images=8, rounds=2)
    answer = one_by_one(net, x)
    exits = [right + wrong for right, wrong in zip(result.right, result.wrong, strict=True)]
    assert exits == answer.exit_index.bincount(minlength=3).tolist()


@pytest.mark.parametrize("wrong", ["exits", "logits"])
def test_a_way_that_disagrees_gets_no_speed(found, monkeypatch, wrong):
    net, _, x, labels, *_ = found

    def accelerate(net, **_):
        def run(x):
            got = net(x)
            if wrong == "exits":
                return got._replace(exit_index=(got.exit_index + 1) % 3)
            return got._replace(logits=got.logits + 0.01)

        return run

    monkeypatch.setattr(demonstration, "accelerate", accelerate)
    with pytest.raises(RuntimeError, match=r"'eefast compact, learned' disagrees.*its speed is not measured"):
        demonstration.demonstrate(net, {}, x, labels, batch_size=16, loop_images=20, rounds=2)
