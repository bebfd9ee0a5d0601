"""What is captured, measured and checked before the compact engine has CUDA graphs, on the CPU."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from graphs_on_cpu import SHAPE, assert_same, capture_on_cpu, network, planned, run
from networks import images
from recorded_graphs import recorded

from eefast.engines import CompactEngine, GraphEngine, graphs
from eefast.engines.host_reads import Times
from eefast.engines.stores import Stores
from eefast.planning import capture, launch_costs
from eefast.planning.fusing import fuse_convolutions
from eefast.planning.indexed_stages import reading_through_rows


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch)


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


ALL_SIZES = len(graphs.sizes(64))


@pytest.mark.parametrize(
    ("allowed", "kept"),
    [(1000, (64, 2, ALL_SIZES)), (100, (64, 2, 9)), (60, (64, 2, 7)), (30, (64, 1, 7)), (20, (16, 1, 5)), (0, None)],
    ids=str,
)
@pytest.mark.sampled(3)
def test_out_of_memory_leaves_fewer_sizes_then_smaller_batches(
    net: Any, allowed: int, kept: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """allowed: graphs for which there is memory; kept: images, queues and sizes of those that stay."""
    keep, budget = graphs.captured, 0

    def short(*args: Any) -> Any:
        nonlocal budget
        budget -= 1
        if budget < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return keep(*args)

    class Counted(graphs.Graphs):
        def __init__(self, *args: Any, **more: Any) -> None:
            nonlocal budget
            budget = allowed
            super().__init__(*args, **more)

    monkeypatch.setattr(graphs, "captured", short)
    monkeypatch.setattr(capture, "Graphs", Counted)
    p, x = planned(net, 64), images(20, SHAPE)
    assert_same(run(p, net, x), net(x))
    g = getattr(p, "graphs", None)
    assert ((g.capacity, g.queues, len(g.sizes)) if g else None) == kept
    reason = p.plan.reason
    assert ("memory was full" in reason or "memory is full" in reason) == (allowed < 1000)


def test_a_stage_that_cannot_be_captured(net: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refused(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refused)
    p, x = planned(net, 8), images(5, SHAPE)
    assert "without CUDA graphs: RuntimeError: operation not permitted" in str(p.plan)
    assert_same(run(p, net, x), net(x))


@pytest.mark.parametrize("part", ["logits", "confidence"])
def test_answers_that_are_no_numbers_mean_no_graphs(net: Any, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Stores.take

    def poisoned(self: Any, slot: int, size: int) -> Any:
        result = take(self, slot, size)
        getattr(result, part)[-1] = torch.nan
        return result

    monkeypatch.setattr(Stores, "take", poisoned)
    p, x = planned(net, 8), images(5, SHAPE)
    assert f"without CUDA graphs: RuntimeError: their answers differ by nan of the largest ({part})" in str(p.plan)
    assert not isinstance(p, GraphEngine)
    assert_same(run(p, net, x), net(x))


def test_wrong_answers_mean_no_graphs(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Stores.advance

    def forgetful(self: Any, queue: int, stage: int, rows: int, counted: bool = False) -> None:
        advance(self, queue, stage, rows, counted)
        if stage == 1:
            # The survivors' maps are in another order than their positions.
            waiting = self.before(queue, stage + 1)
            waiting.features.copy_(waiting.features.roll(1, 0))

    monkeypatch.setattr(Stores, "advance", forgetful)
    p, x = planned(net, 8), images(5, SHAPE)
    assert "without CUDA graphs: RuntimeError: their answers differ by" in str(p.plan)
    assert not isinstance(p, GraphEngine)
    assert_same(run(p, net, x), net(x))


def test_survivors_of_the_example_guide_the_plan(net: Any) -> None:
    x = images(40, SHAPE)
    taken = net(x).exit_index
    p = planned(net, 8, x)
    arriving = [int((taken >= i).sum()) for i in range(4)]
    expected = tuple(b / a for a, b in itertools.pairwise(arriving))
    assert p.graphs.policies[0].times.survivors == pytest.approx(expected)
    assert planned(net, 8).graphs.policies[0].times.survivors == (0.5,) * 3


def test_the_plan_says_what_the_example_costs_in_time(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that take 4, 2, 1 and 1 ms; the last is reached by all that survive the exits before it."""

    def measured(made: Any, *_: Any) -> Times:
        stages = tuple((seconds,) * len(made.sizes) for seconds in (4e-3, 2e-3, 1e-3, 1e-3))
        return Times(made.sizes, stages, (None,) * 4, 1e-5, 1e-6, (0.5, 0.5, 0.5))

    monkeypatch.setattr(capture, "measured", measured)
    monkeypatch.setattr(capture, "survivors_of", lambda *_: [0.5, 0.5, 0.5])
    plan = planned(net, 8, images(64, SHAPE)).plan
    in_macs = 0.5 * net.cost[0] + 0.25 * net.cost[1] + 0.125 * net.cost[2] + 0.125
    assert plan.reasons[-1] == (
        f"the mean cost of the example inputs is {in_macs:.2f} in MACs and {(4 + 1 + 0.25 + 0.125) / 8:.2f} "
        "in the time of the stages"
    )
    assert [row.time for row in plan.stages] == pytest.approx([0.5, 0.25, 0.125, 0.125])


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_survivors_stay_in_place_where_that_is_faster(net: Any, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """By the times of the graphs that leave and read them so, beside those of copies."""
    ways: dict[Any, str] = {}

    def captured(work: Any, fill: Any, pool: Any) -> Any:
        replay = recorded(work, fill, pool)
        ways[replay] = getattr(work, "__qualname__", "")
        return replay

    def seconds(work: Any, device: Any) -> float:
        work()
        return 1e-4 * (factor if "in_place" in ways[work] else 1.0)

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setenv("EEFAST_GRAPHS", "0")
    bare = planned(net, 8)
    monkeypatch.delenv("EEFAST_GRAPHS")
    forms = [reading_through_rows(fuse_convolutions(step.stage)[0]) for step in bare.steps]
    steps = [replace(step, through=form) for step, form in zip(bare.steps, forms, strict=True)]
    monkeypatch.setattr(launch_costs, "seconds", seconds)
    with torch.no_grad():
        made = capture.with_graphs(CompactEngine(net, bare.plan, steps), images(64, SHAPE), 8)
    assert isinstance(made, GraphEngine)
    assert list(made.graphs.used) == ([0, 1] if factor < 1 else [])
    assert ("survivors read in place" in made.plan.reason) == (factor < 1)
    assert capture.with_graphs(CompactEngine(net, bare.plan, steps), None, 8).graphs.paths == []


def test_sizes_and_algorithms_at_the_expected_rows(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each stage the rows that are expected there, of one queue or two; only these let cuDNN try its algorithms."""
    keep, tried = graphs.captured, list[bool]()

    def noted(*arguments: Any) -> Any:
        tried.append(torch.backends.cudnn.benchmark)
        return keep(*arguments)

    monkeypatch.setattr(graphs, "captured", noted)
    planned(net, 31)
    assert not any(tried)
    tried.clear()
    x = images(40, SHAPE)
    g = planned(net, 31, x).graphs
    expected = [graphs.arriving(rows, g.policies[0].times.survivors) for rows in (31, 16)]
    assert set(graphs.sizes(31)) < set(g.sizes)
    for stage, pair in enumerate(zip(*expected, strict=True)):
        for rows in pair:
            assert g.size_for(rows) <= 1.03 * rows
            assert (stage, g.size_for(rows)) in g.expected
    assert tried.count(True) == 2 * len(g.expected) <= 2 * 4 * 2
    assert not torch.backends.cudnn.benchmark


def test_times_are_those_of_the_expected_survivors(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a graph by whether all rows or none go on, which the last stage does not ask."""
    g = planned(net, 8).graphs

    def seconds(work: Any, device: Any) -> float:
        work()
        return 3.0 if g.thresholds[0] == g.net.criterion.never else 1.0

    monkeypatch.setattr(launch_costs, "seconds", seconds)
    times = capture.measured(g, launch_costs.LaunchCosts(0.0, 0.0), [0.0, 0.5, 1.0])
    assert [set(stage) for stage in times.stages] == [{1.0}, {2.0}, {3.0}, {3.0}]
    assert times.survivors == (0.0, 0.5, 1.0)


def test_the_plan_tells_sizes_queues_and_memory(net: Any) -> None:
    p = planned(net, 8)
    assert f"{2 * 4 * 7} CUDA graphs, 7 batch sizes up to 8, 2 under way at a time, 0 MB" in str(p.plan)
    assert len(re.findall(r"; (the host reads the count|carried along|the next stage counts)\n", str(p.plan))) == 3
    assert str(p.plan).endswith("; the end")


def test_switched_off(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EEFAST_GRAPHS", "0")
    assert not isinstance(planned(net, 8), GraphEngine)
