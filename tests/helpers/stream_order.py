"""CUDA's streams and events on the CPU: operations run at once, and are checked for the order that a GPU needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from eefast.engines import graphs, stores

Clock = dict[str, int]
"""Of each stream, how many of its operations are known to be done."""


@dataclass
class _Memory:
    """Where a tensor is stored: the stream of its allocation, the last write, and all reads since."""

    reference: StorageWeakRef
    home: str
    written: tuple[str, int] | None = None
    read: Clock = field(default_factory=dict)
    kept_for: set[str] = field(default_factory=set)


class StreamOrder(TorchDispatchMode):
    """Every operation inside belongs to the current stream, see `on`; `faults` tells what no event orders.

    An operation comes after those before it in its stream, after what the stream has waited for, and after what the
    host has waited for. Memory that is freed goes back to the stream it was made on: operations of other streams must
    come before, or be told by `keep`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []
        self._current = "first"
        self._clocks: dict[str, Clock] = {}
        self._host: Clock = {}
        self._memory: dict[int, _Memory] = {}

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def event(self) -> Event:
        return Event(self)

    def keep(self, part: Tensor) -> None:
        """`Tensor.record_stream` of the current stream."""
        self._of(part).kept_for.add(self._current)

    def synchronize(self) -> None:
        """The host waits for all streams."""
        self._sweep()
        for clock in self._clocks.values():
            join(self._host, clock)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:  # addresses only
            return func(*args, **kwargs)
        self._sweep()
        clock = self._clock()
        tick = clock[self._current] = clock.get(self._current, 0) + 1
        named = [*zip(func._schema.arguments, args, strict=False)]
        named += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
        written = []
        for argument, value in named:
            for x in tensors(value):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written.append(x)
                else:
                    self._reads(x, str(func), tick)
        for x in written:
            self._writes(x, str(func), tick)
        results = func(*args, **kwargs)
        for x in tensors(results):
            if x.untyped_storage()._cdata not in self._memory:
                self._writes(x, str(func), tick)
        return results

    def _clock(self) -> Clock:
        clock = self._clocks.setdefault(self._current, {})
        join(clock, self._host)
        return clock

    def _of(self, x: Tensor) -> _Memory:
        storage = x.untyped_storage()
        made = _Memory(StorageWeakRef(storage), self._current)
        return self._memory.setdefault(storage._cdata, made)

    def _reads(self, x: Tensor, name: str, tick: int) -> None:
        memory = self._of(x)
        if memory.written:
            self._after(memory.written, f"{name} reads what {memory.written[0]} may not have written")
        memory.read[self._current] = tick

    def _writes(self, x: Tensor, name: str, tick: int) -> None:
        memory = self._of(x)
        for other in (*memory.read.items(), *([memory.written] if memory.written else [])):
            self._after(other, f"{name} writes what {other[0]} may not be done with")
        memory.written, memory.read = (self._current, tick), {}

    def _after(self, other: tuple[str, int], fault: str) -> None:
        stream, tick = other
        if self._clock().get(stream, 0) < tick:
            self.faults.append(f"{self._current}: {fault}")

    def _sweep(self) -> None:
        """What has been freed since the last operation or event."""
        for key, memory in list(self._memory.items()):
            if memory.reference.expired():
                del self._memory[key]
                known = dict(self._clocks.get(memory.home, {}))
                join(known, self._host)
                for stream, tick in (*memory.read.items(), *([memory.written] if memory.written else [])):
                    if stream not in (memory.home, *memory.kept_for) and known.get(stream, 0) < tick:
                        self.faults.append(f"{memory.home}: memory was freed that {stream} may not be done with")


class Event:
    def __init__(self, order: StreamOrder) -> None:
        self._order, self._clock = order, dict[str, int]()

    def record(self, stream: Any = None) -> None:
        self._order._sweep()
        self._clock = dict(self._order._clock())

    def wait(self) -> None:
        self._order._sweep()
        join(self._order._clock(), self._clock)

    def synchronize(self) -> None:
        self._order._sweep()
        join(self._order._host, self._clock)


def join(clock: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


def tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, values)
    return found


@contextmanager
def checked_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[StreamOrder]:
    """The engines' events belong to it; captures, which `graphs_on_cpu` replaces, happen on a stream of their own."""
    order = StreamOrder()

    @contextmanager
    def capturing(device: torch.device) -> Iterator[None]:
        order.synchronize()
        with order.on("capture"):
            yield
        order.synchronize()

    monkeypatch.setattr(graphs, "event", order.event)
    monkeypatch.setattr(graphs, "capturing", capturing)
    monkeypatch.setattr(stores, "keep_until_done", order.keep)
    with order:
        yield order
