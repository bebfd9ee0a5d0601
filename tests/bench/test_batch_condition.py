"""BatchCond's three ways through an exit: the network's own answers, and as many rows and waits as each promises."""

import pytest
import torch
from launch_gaps import host_waits
from networks import assert_same_answers, images, lived_in, spread_thresholds
from peers import batch_condition
from peers.batch_condition import BreakEven

from eefast import zoo

SHAPE = (3, 12, 12)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def net():
    net = lived_in(zoo.eenet("eenet20", 3, head="conv1", input_shape=SHAPE), 5)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


@pytest.mark.parametrize("n", [0, 1, 3, 31, 257])
@pytest.mark.parametrize("mode", batch_condition.MODES)
@torch.no_grad()
def test_answers_of_the_network(net, mode, n):
    run = batch_condition.prepare(net, mode, torch.float32, max(n, 1))
    x = images(n, SHAPE, seed=n)
    assert_same_answers(run(x.contiguous(memory_format=torch.channels_last)), net(x), net)


@pytest.mark.parametrize("threshold", [-1.0, 2.0], ids=["all exit at once", "none exits"])
@pytest.mark.parametrize("mode", batch_condition.MODES)
@torch.no_grad()
def test_thresholds_may_change(net, mode, threshold):
    early = net.with_criterion("learned", net.thresholds.tolist())
    run, x = batch_condition.prepare(early, mode, torch.float32, 31), images(31, SHAPE)
    run(x)
    early.thresholds.fill_(threshold)
    assert_same_answers(run(x), early(x), early)
    assert run(x).exit_index.unique().tolist() == [0 if threshold < 0 else 3]


@pytest.mark.parametrize("mode", batch_condition.MODES)
@pytest.mark.parametrize("criterion", ["entropy", "margin"])
@torch.no_grad()
def test_other_criteria(net, criterion, mode):
    early, x = net.with_criterion(criterion, [0.5] * 3), images(31, SHAPE)
    spread_thresholds(early, x, 0.4)
    assert_same_answers(batch_condition.prepare(early, mode, torch.float32, 31)(x), early(x), early)


@torch.no_grad()
def rows_and_waits(net, splits, x):
    seen = []

    def counted(step):
        def run(features):
            assert features.is_contiguous(memory_format=torch.channels_last)
            seen.append(len(features))
            return step(features)

        return run

    steps = [counted(step) for step in batch_condition.steps(net, torch.float32)]
    run = batch_condition.in_steps(net, steps, splits)
    waits = host_waits(lambda: run(x), "cpu")
    return seen, waits


@torch.no_grad()
def test_rows_carried_and_waits(net):
    x = images(64, SHAPE).contiguous(memory_format=torch.channels_last)
    exits = net(x).exit_index
    arriving = [int((exits >= i).sum()) for i in range(4)]
    assert len(set(arriving)) == 4
    assert rows_and_waits(net, None, x) == ([64] * 4, 0)
    assert rows_and_waits(net, lambda *_: True, x) == (arriving, 3)
    asked = []
    assert rows_and_waits(net, lambda *case: asked.append(case) or case[0] == 1, x) == ([64, 64, *[arriving[2]] * 2], 3)
    assert asked == [(0, 64, arriving[1]), (1, 64, arriving[2]), (2, arriving[2], arriving[3])]


def test_a_batch_is_split_where_that_saves_time():
    # One second for each row of the stages; to gather takes 2 seconds.
    table = BreakEven(stages=(tuple(range(9)),) * 2, gathers=((2.0,) * 9, (0.0,) * 9))
    assert [table(0, 8, survivors) for survivors in range(1, 9)] == [True] * 5 + [False] * 3
    assert [table(1, 8, survivors) for survivors in range(1, 9)] == [True] * 7 + [False]


def test_the_table_is_measured_at_powers_of_two_and_a_line_in_between(net, monkeypatch):
    asked = []

    def fake(work, device):
        features = work.args[0]
        asked.append(len(features) if len(work.args) == 1 else len(work.args[1]))
        return float(asked[-1]) if len(work.args) == 1 else 0.5

    monkeypatch.setattr(batch_condition, "median_seconds", fake)
    steps = batch_condition.steps(net, torch.float32)
    table = batch_condition.measured(steps, SHAPE, torch.float32, CPU, 12)
    assert asked == [1, 2, 4, 8, 12] * 6
    assert table.stages == ((1.0, *(float(n) for n in range(1, 13))),) * 3
    assert table.gathers == ((0.5,) * 13,) * 3
    assert len(batch_condition.measured(steps, SHAPE, torch.float32, CPU, 1).stages[0]) == 2


def test_an_unknown_mode(net):
    with pytest.raises(ValueError, match="mode='sorting' is unknown; choose one of padding, splitting, table"):
        batch_condition.prepare(net, "sorting", torch.float32, 8)
