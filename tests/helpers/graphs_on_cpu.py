"""CUDA graphs on the CPU: a capture that keeps the work to run it again; a network and engines with such graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from networks import images, lived_in, spread_thresholds

from eefast import zoo
from eefast.engines import graphs
from eefast.engines.host_reads import HostReadPolicy
from eefast.planning import Options, build, capture, launch_costs
from eefast.planning.launch_costs import LaunchCosts

SHAPE = (3, 16, 16)


class NoEvent:
    def record(self) -> None:
        pass

    wait = synchronize = record


@contextmanager
def nowhere(device: torch.device) -> Iterator[None]:
    yield None


def keep(work: Callable[[], None], fill: Callable[[], None], pool: Any) -> Callable[[], None]:
    work()
    fill()
    return work


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch, captured: Any = keep) -> None:
    """Replays do the work again; sizes, queues, memory and everything of the host are as on a GPU.

    captured: `recorded_graphs.recorded` takes ten times as long, and its replays know no more than those of CUDA.
    """
    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "capturing", nowhere)
    monkeypatch.setattr(graphs, "event", NoEvent)
    monkeypatch.setattr(graphs, "on", lambda device: nullcontext())
    monkeypatch.setattr(graphs, "reserved", lambda device: 0)
    monkeypatch.setattr(capture, "forget", lambda: None)
    monkeypatch.setattr(capture, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(launch_costs, "load", lambda device: LaunchCosts(launch=5e-6, wait=15e-6))
    monkeypatch.setattr(launch_costs, "seconds", lambda work, device: (work(), 1e-4)[1])


def network() -> Any:
    net = lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


def planned(net: Any, capacity: int, example_inputs: torch.Tensor | None = None) -> Any:
    return build(net, Options("compact", None, example_inputs, capacity, stages="pytorch"))


@torch.no_grad()
def run(engine: Any, net: Any, x: torch.Tensor) -> Any:
    """The engine's answers by the thresholds of `net`, which may be another network than the engine's."""
    return engine.run(x, net.thresholds)


def reading(engine: Any, reads: Callable[[int], bool], queues: int) -> None:
    """Where the host reads a count, though the planner might not choose so."""

    class Fixed(HostReadPolicy):
        def __call__(self, stage: int, most: int, expected: float) -> tuple[bool, float]:
            return reads(stage), expected * 0.6

        def seconds(self, rows: int) -> float:
            return 0.0 if self.queues == queues else 1.0

    engine.graphs.policies = [Fixed(p.times, p.queues) for p in engine.graphs.policies]


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.exit_index, expected.exit_index)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.confidence, expected.confidence, rtol=1e-4, atol=1e-4)
