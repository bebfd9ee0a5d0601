"""The compact engine in CUDA graphs: one for each lane, stage and batch size; counts arrive in pinned memory."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..planning import launch_costs
from ..planning.planner import Plan, StagePlan
from ..planning.trial import difference
from ..result import ExitResult, concatenated
from .compact import Stores, run_eagerly
from .host_reads import Counted, Times, Ways, lanes_for, sizes
from .schedule import answers

LANES = 2

ATTEMPTS = ((LANES, 1.25), (LANES, 1.6), (LANES, 2.0), (1, 2.0))
"""(lanes, ratio of neighbouring batch sizes): what is tried, one after the other, where memory runs out."""

SURVIVORS = 0.5
"""Share of the arriving rows that goes on at an early exit, where no example images tell."""

ROUNDS = 3

TOLERANCE = 0.05
"""Largest difference between logits with and without graphs ÷ largest logit at planning; beyond it, no graphs."""

_graphs_run_on = ("cuda",)

log = logging.getLogger("eefast")


class Graphs(Stores):
    """Every stage and exit as a CUDA graph for each of a few batch sizes, and in its device-counted form.

    Queueing a stage is one replay. The host learns the number of survivors from pinned memory once an event has passed;
    with two lanes the device works on the other one's batch meanwhile.

    waits: how often the host has waited for a count. busy: held while a batch or a stream is under way.
    """

    def __init__(self, plan: Plan, net: EarlyExitNet, capacity: int, lanes: int, step: float) -> None:
        super().__init__(plan, net, lanes, capacity, net.thresholds)
        self.limits = self.thresholds
        self.sizes, self.lanes, self.waits = sizes(capacity, step), lanes, 0
        self.device, self.busy = net.cost.device, threading.Lock()
        self.counts = torch.zeros(lanes, self.stages, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.passed = [_event() for _ in range(lanes)]
        self.finished = _event()
        self.replays: dict[tuple[int, int, int | None], Callable[[], None]] = {}
        before = _reserved(self.device)
        with _capturing(self.device) as pool:
            for lane in range(lanes):
                self._before(lane, 0, torch.empty(0, *net.input_shape, device=self.device))
                for stage in range(self.stages):
                    # The largest first: what it leaves of the pool serves the smaller ones.
                    for rows in reversed(self.sizes):
                        self._capture(lane, stage, rows, rows, pool)
                    # All images are live when they arrive.
                    if plan.steps[stage].counted is not None and stage:
                        self._capture(lane, stage, None, capacity, pool)
        self.clear()
        self.megabytes = (_reserved(self.device) - before) / 1e6

    def _capture(self, lane: int, stage: int, key: int | None, rows: int, pool: Any) -> None:
        def work() -> None:
            self.advance(lane, stage, rows, counted=key is None)
            if stage < self.stages - 1:
                there = self._waiting[lane][stage + 1]
                assert there is not None
                self.counts[lane, stage + 1 : stage + 2].copy_(there.count, non_blocking=True)

        def fill() -> None:
            self.clear()
            here = self._waiting[lane][stage]
            assert here is not None
            here.count.fill_(rows)

        fill()
        self.replays[lane, stage, key] = _captured(work, fill, pool)

    def measured(self, survivors: Iterable[float]) -> Times:
        """Seconds of all graphs of one lane, all rows going on; what else a device takes is in `device_table`."""
        self.thresholds.fill_(_never(self.net))
        table = launch_costs.load(self.device)
        stages = tuple(tuple(self._seconds(stage, n, n) for n in self.sizes) for stage in range(self.stages))
        return Times(
            self.sizes,
            stages,
            tuple(map(self._counted, range(self.stages))),
            table.wait,
            table.launch,
            tuple(survivors),
        )

    def _counted(self, stage: int) -> Counted | None:
        if (0, stage, None) not in self.replays:
            return None
        few, many = 1, self.capacity
        least, most = self._seconds(stage, None, few), self._seconds(stage, None, many)
        row = max(0.0, most - least) / max(many - few, 1)
        return Counted(least - row * few, row)

    def _seconds(self, stage: int, key: int | None, live: int) -> float:
        found = float("inf")
        for _ in range(ROUNDS):
            self.clear()
            here = self._waiting[0][stage]
            assert here is not None
            here.count.fill_(live)
            found = min(found, launch_costs.seconds(self.replays[0, stage, key], self.device))
        self.clear()
        return found

    def use(self, times: Times) -> None:
        """Choose the ways through the exits by these times."""
        self.ways = [Ways(times, lanes) for lanes in range(1, self.lanes + 1)]

    def launch(self, lane: int, stage: int, rows: int, expected: float) -> None:
        ways = self.ways[0]
        counted = (lane, stage, None) in self.replays and ways.counted(stage, rows, expected)
        with _on(self.device):
            self.replays[lane, stage, None if counted else self.sizes[ways.bucket(rows)]]()
            self.passed[lane].record()

    def count(self, lane: int, stage: int) -> int:
        self.waits += 1
        self.passed[lane].synchronize()
        return int(self.counts[lane, stage])

    def chunks(self, x: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """A batch cut into what begins together, and the number of lanes; what exceeds the capacity goes in pieces."""
        n = len(x)
        if n <= self.capacity:
            lanes = lanes_for(self.ways[0].times, n, self.ways) if n else 1
            return x.split(max(1, ceil(n / lanes))), lanes
        pieces = ceil(n / max(1, self.capacity // 2))
        return x.split(ceil(n / pieces)), self.lanes

    def take_hold(self, net: EarlyExitNet, x: Tensor, limits: Tensor) -> bool:
        """Whether the graphs are for images of this size and no other thread uses them; then they are the caller's.

        A stream that was dropped holds them until it is collected; calls run without them meanwhile.
        """
        if x.shape[1:] != self.net.input_shape or not self.busy.acquire(blocking=False):
            return False
        self.net, self.limits = net, limits
        return True

    def run(self, net: EarlyExitNet, x: Tensor, limits: Tensor | None = None) -> ExitResult | None:
        """Prepared images → their answers; None where the graphs cannot be had. limits: as in `compact.run`."""
        if not self.take_hold(net, x, net.limits()[0] if limits is None else limits):
            return None
        try:
            return concatenated(list(self._answers(*self.chunks(x))))
        finally:
            self.busy.release()

    def stream(self, chunks: Iterable[Tensor]) -> Iterator[ExitResult]:
        """Results of chunks in order, survivors of several chunks merged; for whoever has taken hold."""
        try:
            yield from self._answers(chunks, self.lanes)
        finally:
            self.busy.release()

    def _answers(self, chunks: Iterable[Tensor], lanes: int) -> Iterator[ExitResult]:
        # Whoever goes on, or closes the iterator, may do so in another thread and on another CUDA stream.
        self._wait()
        results = answers(self, chunks, self.ways[lanes - 1], lanes)
        try:
            self.thresholds.copy_(self.limits)
            for result in results:
                self._record()
                yield result
                self._wait()
        finally:
            self._wait()
            results.close()
            self._record()

    def _wait(self) -> None:
        """What another CUDA stream has queued on the same memory comes first."""
        with _on(self.device):
            self.finished.wait()

    def _record(self) -> None:
        with _on(self.device):
            self.finished.record()


def capture(plan: Plan, net: EarlyExitNet, example: Tensor | None) -> Plan:
    """The plan of the compact engine on CUDA, with graphs for up to `plan.max_batch` images.

    example: prepared images, which tell how many leave at each exit. Where memory runs out there are graphs for fewer
    sizes, then for smaller batches; where a stage cannot be captured there are none; the plan says so.
    """
    if (
        plan.engine != "compact"
        or plan.device.type not in _graphs_run_on
        or os.environ.get("EEFAST_GRAPHS", "1") == "0"
    ):
        return plan
    note, capacity = "", plan.max_batch
    with torch.no_grad(), torch.inference_mode(False), _on(plan.device):
        while capacity >= 1:
            for lanes, step in ATTEMPTS:
                try:
                    graphs = Graphs(plan, net, capacity, lanes, step)
                    _hide_from_torch_compile()
                    graphs.use(graphs.measured(_survivors(net, example)))
                    _check(graphs, plan, net)
                    reason = f"{plan.reason}; {_described(graphs)}{note}"
                    return replace(plan, graphs=graphs, reason=reason, stages=_with_ways(plan, graphs))
                except torch.OutOfMemoryError:
                    pass  # the memory comes back when the exception is gone
                except Exception as error:
                    why = f"without CUDA graphs: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    log.warning("the compact engine runs %s", why)
                    return replace(plan, reason=f"{plan.reason}; {why}")
                note = ", fewer than wanted: the device's memory was full"
                _forget()
            capacity //= 4
    return replace(plan, reason=f"{plan.reason}; without CUDA graphs: the device's memory is full")


def _check(graphs: Graphs, plan: Plan, net: EarlyExitNet) -> None:
    """`RuntimeError` where images that all go to the end get other answers from the graphs than without them."""
    probe = copy.copy(net)
    probe._buffers = {**net._buffers, "thresholds": torch.full_like(net.thresholds, _never(net))}
    x = torch.randn(min(graphs.capacity, 32), *net.input_shape, generator=torch.Generator().manual_seed(0))
    x = x.to(graphs.device, plan.dtype)
    got, expected = graphs.run(probe, x), run_eagerly(plan, probe, x)
    graphs.waits = 0
    assert got is not None
    # Another batch size may mean another algorithm, so last bits differ; another image's answer differs far more.
    for name in ("logits", "confidence"):
        if different := difference(getattr(got, name), getattr(expected, name), TOLERANCE):
            raise RuntimeError(f"their {different} ({name})")
    if not torch.equal(got.exit_index, expected.exit_index):
        raise RuntimeError("they take other exits than without graphs")


def _never(net: EarlyExitNet) -> float:
    """A threshold at which nobody leaves."""
    return float("inf") if net.criterion.comparison == ">" else -float("inf")


def _described(graphs: Graphs) -> str:
    return (
        f"{len(graphs.replays)} CUDA graphs, {len(graphs.sizes)} batch sizes up to {graphs.capacity}, "
        f"{graphs.lanes} under way at a time, {graphs.megabytes:.0f} MB"
    )


def _with_ways(plan: Plan, graphs: Graphs) -> tuple[StagePlan, ...]:
    """The rows of the plan's table, with what happens at the exits of the largest batch."""
    n = graphs.capacity
    lanes = lanes_for(graphs.ways[0].times, n, graphs.ways)
    ways = graphs.ways[lanes - 1].path(ceil(n / lanes))
    return tuple(replace(row, note=f"{row.note}; {way}") for row, way in zip(plan.stages, ways, strict=True))


def _survivors(net: EarlyExitNet, example: Tensor | None) -> list[float]:
    """Share of the arriving rows that goes on at each early exit."""
    if example is None or len(example) == 0:
        return [SURVIVORS] * net.num_exits
    taken = net.first_exits(example.to(next(net.parameters()))).exit_index
    arriving = [int((taken >= i).sum()) for i in range(net.num_exits + 1)]
    return [on / at if at else SURVIVORS for at, on in itertools.pairwise(arriving)]


@cache
def _hide_from_torch_compile() -> None:
    """Replays, locks and events cannot be traced. Only where there are graphs, since the import takes a second."""
    Graphs.run = torch.compiler.disable(Graphs.run)  # type: ignore[method-assign]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device)


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device)


def _forget() -> None:
    torch.cuda.empty_cache()


@contextmanager
def _capturing(device: torch.device) -> Iterator[Any]:
    """A stream of its own to capture on, and the memory pool that all captures share."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        yield torch.cuda.graph_pool_handle()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def _captured(work: Callable[[], None], fill: Callable[[], None], pool: Any) -> Callable[[], None]:
    """`work` as a graph; run once before, since kernels are loaded and algorithms chosen where no capture goes on."""
    work()
    fill()
    graph = torch.cuda.CUDAGraph()
    # Other threads may allocate meanwhile.
    graph.capture_begin(pool=pool, capture_error_mode="thread_local")
    try:
        work()
    except BaseException:
        with suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph.replay
