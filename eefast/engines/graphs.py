"""The compact engine in CUDA graphs: one for each queue, stage and batch size; counts arrive in pinned memory."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import accumulate, chain
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitResult, concatenated
from .compact import CompactEngine
from .engine import Rule
from .host_reads import HostReadPolicy, Times, arriving, queues_for, sizes
from .program import CompactStep, Plan
from .schedule import Chunk, OfEach, answers
from .stores import InPlace, Stores
from .streaming import ordered

log = logging.getLogger("eefast")


class GraphEngine(CompactEngine):
    """Has graphs for images of the network's input shape, one call at a time; all others run without."""

    def __init__(self, engine: CompactEngine, plan: Plan, graphs: Graphs) -> None:
        super().__init__(engine.net, plan, engine.steps)
        self.graphs = graphs
        self._of_each: Graphs | None = None
        self._capturing = threading.Lock()

    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        graphs = self._graphs_for(thresholds)
        if not graphs.taken(images):
            return self.run_eagerly(images, thresholds, rule)
        return graphs.run(images, thresholds, self.rule_of(rule))

    def _graphs_for(self, thresholds: Tensor) -> Graphs:
        """Others where each image has its thresholds; captured when the first such images come."""
        if thresholds.dim() == 1:
            return self.graphs
        with self._capturing:
            if self._of_each is None:
                self._of_each = self.graphs.of_each_image()
            return self._of_each

    def _chunk(self) -> int:
        return max(1, self.graphs.capacity // 2)

    def _merged(self, chunks: Iterator[Chunk], size: int, thresholds: Tensor, rule: Rule) -> Iterator[ExitResult]:
        first = next(chunks)
        chunks = chain([first], chunks)
        graphs = self._graphs_for(thresholds)
        if graphs.taken(first.images if isinstance(first, OfEach) else first):
            yield from graphs.stream(chunks, thresholds, self.rule_of(rule))
        else:
            yield from super()._merged(chunks, size, thresholds, rule)


class Graphs(Stores):
    """Every stage and exit as a CUDA graph for each of a few batch sizes, and in its device-counted form.

    Queueing a stage is one replay. The host learns the number of survivors from pinned memory once an event has passed;
    with two queues the device works on the other one's batch meanwhile.

    survivors: share of the arriving rows that is known to go on, per early exit; empty where it is not known. With it
        there are graphs of the sizes that are expected at each stage, in which cuDNN's fastest algorithms run: trying
        them takes longer than a capture.
    in_place: whether survivors on the expected path may stay where the stage before has computed them, if the next one
        can read them there; they are copied where they meet others, or another number of them than expected comes.
    paths: per number of queues, the sizes at each stage of a batch of `capacity`; used: those whose survivors stay.
    waits: how often the host has waited for a count. busy: held while a batch or a stream is under way.
    """

    policies: Sequence[HostReadPolicy]

    def __init__(
        self, net: EarlyExitNet, plan: Plan, steps: Sequence[CompactStep], capacity: int, queues: int, step: float,
        survivors: Sequence[float] = (), of_each: bool = False, in_place: bool = True,
    ) -> None:  # fmt: skip
        thresholds = net.thresholds[:, None] if of_each else net.thresholds
        super().__init__(net, plan, steps, queues, capacity, thresholds, net.current_rule())
        self.step, self.survivors, self.queues, self.waits = step, survivors, queues, 0
        whole = [arriving(ceil(capacity / parts), survivors) for parts in range(1, queues + 1)] if survivors else []
        self.sizes = sizes(capacity, step, sorted({rows for stages in whole for rows in stages}))
        self.expected = {(stage, self.size_for(rows)) for stages in whole for stage, rows in enumerate(stages)}
        self.device, self.busy = net.cost.device, threading.Lock()
        self.counts = torch.zeros(queues, self.stages, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        self.passed = [event() for _ in range(queues)]
        self.finished = event()
        # Replays are queued on streams that the allocator knows nothing of; it would hand on the memory under them.
        weakref.finalize(self, self.finished.synchronize).atexit = False
        self._told = False
        in_place = in_place and any(step.through is not None for step in self.steps)
        # No more rows than the stage before has left.
        self.paths = [[*accumulate(map(self.size_for, stages), min)] for stages in whole] if in_place else []
        self.used: Sequence[int] = range(len(self.paths))
        self.left: dict[tuple[int, int, int], InPlace] = {}
        self.through: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.settles: dict[tuple[int, int, int], Callable[[], None]] = {}
        self.replays: dict[tuple[int, int, int | None], Callable[[], None]] = {}
        before = reserved(self.device)
        with capturing(self.device) as pool:
            for queue in range(queues):
                self._made_before(queue, 0, torch.empty(0, *net.input_shape, device=self.device))
                for stage in range(self.stages):
                    # The largest first: what it leaves of the pool serves the smaller ones.
                    for rows in reversed(self.sizes):
                        self._capture(queue, stage, rows, rows, pool)
                    # All images are live when they arrive.
                    if self.steps[stage].counted is not None and stage:
                        self._capture(queue, stage, None, capacity, pool)
                for path in range(queue, len(self.paths)):
                    for stage in range(self.stages):
                        self._capture_in_place(queue, stage, path, pool)
        self.clear()
        self.megabytes = (reserved(self.device) - before) / 1e6

    def of_each_image(self) -> Graphs:
        """The same where each image has its thresholds."""
        with torch.inference_mode(False), torch.no_grad():
            sizes = self.capacity, self.queues, self.step, self.survivors
            made = Graphs(self.net, self.plan, self.steps, *sizes, of_each=True, in_place=bool(self.paths))
        made.policies, made.used = self.policies, self.used
        return made

    def _capture(self, queue: int, stage: int, key: int | None, rows: int, pool: Any) -> None:
        def work() -> None:
            self.advance(queue, stage, rows, counted=key is None)
            if stage < self.stages - 1:
                arrived = self.before(queue, stage + 1).count
                self.counts[queue, stage + 1 : stage + 2].copy_(arrived, non_blocking=True)

        def fill() -> None:
            self.fill(queue, stage, rows)

        fill()
        with fastest_algorithms((stage, key) in self.expected):
            self.replays[queue, stage, key] = captured(work, fill, pool)

    def reads(self, stage: int) -> bool:
        """Whether a stage can read survivors where the one before has left them."""
        return stage > 0 and self.steps[stage].through is not None

    def leaves(self, stage: int) -> bool:
        return stage < self.stages - 1 and self.reads(stage + 1)

    def _capture_in_place(self, queue: int, stage: int, path: int, pool: Any) -> None:
        rows, source = self.paths[path][stage], self.left.get((queue, stage, path))
        if source is None and not self.leaves(stage):
            return

        def work() -> None:
            left = self.advance(queue, stage, rows, source=source, leaves=self.leaves(stage))
            if left is not None:
                self.left[queue, stage + 1, path] = left
            if stage < self.stages - 1:
                arrived = self.before(queue, stage + 1).count
                self.counts[queue, stage + 1 : stage + 2].copy_(arrived, non_blocking=True)

        def fill() -> None:
            self.fill_in_place(queue, stage, path)

        fill()
        with fastest_algorithms(True):
            self.through[queue, stage, path] = captured(work, fill, pool)
        if (left := self.left.get((queue, stage + 1, path))) is not None:

            def fill_next() -> None:
                self.fill_in_place(queue, stage + 1, path)

            fill_next()
            settle = partial(self.settle, queue, stage + 1, left)
            self.settles[queue, stage + 1, path] = captured(settle, fill_next, pool)

    def fill_in_place(self, queue: int, stage: int, path: int) -> None:
        """As `fill` for the path's rows; what the stage before is to have left holds numbers and places."""
        if (source := self.left.get((queue, stage, path))) is not None:
            source.features.zero_()
            source.rows.copy_(self.order[: len(source.rows)])
        self.fill(queue, stage, self.paths[path][stage])

    def size_for(self, rows: int) -> int:
        """The smallest size with a graph that holds `rows`."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def fill(self, queue: int, stage: int, rows: int) -> None:
        """`rows` rows wait before this stage, each with its place in the results, none elsewhere."""
        self.clear()
        here = self.before(queue, stage)
        here.positions[:rows].view(-1).copy_(self.order[:rows])
        here.count.fill_(rows)

    def use(self, times: Times) -> None:
        """Choose by these times where the host reads a count."""
        self.policies = [HostReadPolicy(times, queues) for queues in range(1, self.queues + 1)]

    def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
        policy = self.policies[0]
        counted = (queue, stage, None) in self.replays and policy.counted(stage, rows, expected)
        with on(self.device):
            self._replay(queue, stage, None if counted else self.sizes[policy.bucket(rows)])
            self.passed[queue].record()

    def _replay(self, queue: int, stage: int, key: int | None) -> None:
        """The stage on all that waits before it, wherever it is; survivors stay in place where nothing else waits."""
        waiting, after = self._places[queue], stage + 1
        source, alone = waiting.pop(stage, None), after not in waiting
        # Where no survivors were left in place, a path can begin with a stage that reads copies anyway.
        begins = [] if self.reads(stage) else [path for path in self.used if (queue, stage, path) in self.through]
        fitting = [p for p in ([source] if source is not None else begins) if self.paths[p][stage] == key]
        if fitting and (alone or not self.leaves(stage)):
            self.through[queue, stage, fitting[0]]()
            waiting[after] = fitting[0] if self.leaves(stage) else None
            return
        for place, path in ((stage, source), (after, waiting.get(after))):
            if path is not None:
                self.settles[queue, place, path]()
        self.replays[queue, stage, key]()
        waiting[after] = None

    def clear(self) -> None:
        super().clear()
        # Per queue: stages before which rows wait; the path that has left them in place, None where they are copied.
        self._places: list[dict[int, int | None]] = [{} for _ in range(self.queues)]

    def count(self, queue: int, stage: int) -> int:
        self.waits += 1
        self.passed[queue].synchronize()
        return int(self.counts[queue, stage])

    def taken(self, x: Tensor) -> bool:
        """Whether the graphs are for images of this size and no other thread uses them; then they are the caller's.

        A stream that was dropped holds them until it is collected; calls run without them meanwhile, and the log says
        so once.
        """
        if x.shape[1:] != self.net.input_shape:
            return False
        if self.busy.acquire(blocking=False):
            return True
        if not self._told:
            self._told = True
            log.warning(
                "the CUDA graphs of the compact engine are in use by another call or stream; calls meanwhile run "
                "without them, slower: close() streams that you do not read to the end"
            )
        return False

    def run(self, x: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        """Prepared images → their answers; the graphs were `taken`."""
        try:
            images, queues = self._chunks(x)
            chunks: Iterable[Chunk] = images
            if self.of_each:
                chunks = map(OfEach, images, thresholds.split([len(part) for part in images], dim=1))
            return concatenated(list(self._answers(chunks, thresholds, rule, queues)))
        finally:
            self.busy.release()

    def stream(self, chunks: Iterable[Chunk], thresholds: Tensor, rule: Rule) -> Iterator[ExitResult]:
        """Results of chunks in order, survivors of several chunks merged; the graphs were `taken`."""
        try:
            yield from self._answers(chunks, thresholds, rule, self.queues)
        finally:
            self.busy.release()

    def _chunks(self, x: Tensor) -> tuple[tuple[Tensor, ...], int]:
        """A batch cut into what begins together, and the number of queues; more than the capacity goes in pieces."""
        n = len(x)
        if n <= self.capacity:
            queues = queues_for(n, self.policies) if n else 1
            return x.split(max(1, ceil(n / queues))), queues
        pieces = ceil(n / max(1, self.capacity // 2))
        return x.split(ceil(n / pieces)), self.queues

    def _answers(self, chunks: Iterable[Chunk], thresholds: Tensor, rule: Rule, queues: int) -> Iterator[ExitResult]:
        def begun() -> Generator[ExitResult, None, None]:
            if not self.of_each:
                self.thresholds.copy_(thresholds)
            if isinstance(self.rule, Tensor) and isinstance(rule, Tensor):
                self.rule.copy_(rule)
            yield from answers(self, chunks, self.policies[queues - 1], queues)

        return ordered(begun(), self._wait, self._record)

    def _wait(self) -> None:
        """What another CUDA stream has queued on the same memory comes first."""
        with on(self.device):
            self.finished.wait()

    def _record(self) -> None:
        with on(self.device):
            self.finished.record()


@contextmanager
def fastest_algorithms(wanted: bool) -> Iterator[None]:
    """Where `wanted`, cuDNN tries its algorithms at the first call with a shape, and takes the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = wanted or before
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# What a test replaces where there is no GPU.


def event() -> torch.cuda.Event:
    return torch.cuda.Event()


def on(device: torch.device) -> Any:
    return torch.cuda.device(device)


def reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device)


@contextmanager
def capturing(device: torch.device) -> Iterator[Any]:
    """A stream to capture on, and the memory pool that all captures share.

    What the garbage collector frees during a capture could call CUDA in a way that ends it.
    """
    torch.cuda.synchronize()
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield torch.cuda.graph_pool_handle()
    finally:
        if collects:
            gc.enable()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def captured(work: Callable[[], None], fill: Callable[[], None], pool: Any) -> Callable[[], None]:
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
