"""What the compact engine queues on CUDA streams is in order, and the checker that says so notices what is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from graphs_on_cpu import capture_on_cpu, planned, reading
from networks import images, lived_in, spread_thresholds
from stream_order import StreamOrder, checked_order

from eefast import zoo
from eefast.engines import Batch, graphs, stores

CAPACITY, SHAPE = 4, (1, 6, 7)


@pytest.fixture(scope="module")
def net() -> Any:
    net = lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2), 1)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Iterator[StreamOrder]:
    capture_on_cpu(monkeypatch)
    with checked_order(monkeypatch) as found:
        yield found


def consume(order: StreamOrder, net: Any) -> Any:
    """A call on another CUDA stream, then a stream whose consumer goes on in another one after every result."""
    engine = planned(net, CAPACITY)
    reading(engine, lambda stage: stage == 1, 2)
    x, made = images(5, SHAPE), order.event()
    made.record()
    with order.on("second"), torch.no_grad():
        made.wait()
        engine.run(x, net.thresholds)

    def batches() -> Iterator[Batch]:
        for i in range(8):
            made = order.event()
            with order.on("reader"):
                x = images(3, SHAPE, seed=i).clone()
                made.record()
            made.wait()
            yield Batch(x, net.thresholds, net)
            del x

    results = engine.stream(batches())
    for i in range(9):
        with order.on(("first", "second", "third")[i % 3]):
            next(results, None)
    return engine


def test_a_stream_that_goes_on_elsewhere(order: StreamOrder, net: Any) -> None:
    consume(order, net)
    assert order.faults == []


def test_a_plan_that_is_dropped_while_its_work_is_queued(order: StreamOrder, net: Any) -> None:
    engine = consume(order, net)
    engine.graphs.replays.clear()  # here they hold the graphs
    del engine
    torch.zeros(1)  # freed memory is looked at by the next operation
    assert order.faults == []


def nothing(*_: Any) -> None:
    pass


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda p: p.setattr(graphs.Graphs, "_wait", nothing), "may not"),
        (lambda p: p.setattr(graphs.Graphs, "_record", nothing), "may not"),
        (lambda p: p.setattr(stores, "keep_until_done", nothing), "memory was freed that"),
    ],
    ids=["no wait", "no record", "memory not kept"],
)
def test_planted_faults(
    order: StreamOrder, net: Any, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Any], None], fault: str
) -> None:
    plant(monkeypatch)
    consume(order, net)
    assert any(fault in found for found in order.faults)


def test_a_plan_that_nothing_waits_for(order: StreamOrder, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs.weakref, "finalize", lambda *_: type("None", (), {"atexit": False}))
    engine = consume(order, net)
    engine.graphs.replays.clear()
    del engine
    torch.zeros(1)
    assert any("capture: memory was freed" in found for found in order.faults)


class TestTheChecker:
    """Two streams that write and read one tensor."""

    @pytest.mark.parametrize("ordered", [True, False])
    def test_reads_after_writes(self, ordered: bool) -> None:
        with StreamOrder() as order:
            x, done = torch.zeros(3), order.event()
            with order.on("a"):
                done.wait()
                x.fill_(1)
                done.record()
            with order.on("b"):
                if ordered:
                    done.wait()
                x + 1
        assert any("a may not have written" in fault for fault in order.faults) != ordered

    @pytest.mark.parametrize("ordered", [True, False])
    def test_writes_after_reads_by_way_of_the_host(self, ordered: bool) -> None:
        with StreamOrder() as order:
            x, made, done = torch.zeros(3), order.event(), order.event()
            made.record()
            with order.on("a"):
                made.wait()
                x + 1
                done.record()
            if ordered:
                done.synchronize()
            x.add_(1)
        assert order.faults == ([] if ordered else ["first: aten.add_.Tensor writes what a may not be done with"])
