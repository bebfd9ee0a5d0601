"""The compact engine's graphs as recorded operations on the same memory, and faults that the recording must notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs_on_cpu import SHAPE, assert_same, capture_on_cpu, network, planned, run
from networks import images, one_by_one
from recorded_graphs import CaptureError, recorded

CAPACITY = 5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_on_cpu(monkeypatch, recorded)


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


@pytest.fixture(scope="module")
def engine(net: Any) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        capture_on_cpu(patched, recorded)
        return planned(net, CAPACITY)


@pytest.mark.parametrize("n", [0, 1, 3, CAPACITY, 13])
def test_answers_of_the_one_by_one_loop(net: Any, engine: Any, n: int) -> None:
    x = images(n, SHAPE, seed=n)
    assert engine.plan.engine == "compact"
    assert_same(run(engine, net, x), one_by_one(net, x) if n else net(x))


def test_other_thresholds_reach_the_graphs(net: Any, engine: Any) -> None:
    x, other = images(9, SHAPE), net.with_criterion("learned", [0.3, 0.5, 0.4])
    for answering in (net, other, net):
        assert_same(run(engine, answering, x), one_by_one(answering, x))


def planted(work: Callable[[torch.Tensor, torch.Tensor], Any]) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Memory from before, [3] and [3], and a graph of `work` on it."""
    source, target = torch.arange(3.0), torch.zeros(3)
    return source, target, recorded(lambda: work(source, target), lambda: None, None)


def test_a_replay_reads_what_is_there_then() -> None:
    source, target, replay = planted(lambda source, target: target.copy_((source * 2).relu_()[1:].sum()))
    source.fill_(5)
    replay()
    assert target.tolist() == [20] * 3


def test_a_capture_changes_no_memory() -> None:
    _, target, replay = planted(lambda source, target: target.add_(source))
    assert target.tolist() == [0, 1, 2]  # of the run before the capture
    replay()
    assert target.tolist() == [0, 2, 4]


def test_a_number_that_python_took_is_that_of_the_capture() -> None:
    number = [1.0]
    _, target, replay = planted(lambda source, target: target.fill_(number[0]))
    number[0] = 2.0
    replay()
    assert target.tolist() == [1] * 3


@pytest.mark.parametrize(
    "reads", [lambda x, _: int(x[1]), lambda x, _: x[x > 1], lambda x, _: bool(x[0] == 0)], ids=["int", "mask", "bool"]
)
def test_reading_the_device_is_refused(reads: Any) -> None:
    with pytest.raises(CaptureError, match="waits for the device"):
        planted(reads)


def test_memory_that_was_freed_after_the_capture() -> None:
    held, target = [torch.ones(3)], torch.zeros(3)
    replay = recorded(lambda: target.add_(held[0]), lambda: None, None)
    replay()
    held.clear()
    with pytest.raises(CaptureError, match="freed after the capture"):
        replay()


def test_what_a_graph_returned_is_not_renewed_for_python() -> None:
    """Python that reads it after the capture has stale values, which the engine's tests then see."""
    kept = []
    source, _, replay = planted(lambda source, target: kept.append(source + 1))
    source.fill_(7)
    replay()
    assert kept[-1].tolist() == [1, 2, 3]
