"""Waiting images → calls of a resident engine that cannot stop between exits, on a few images each, in threads."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from math import inf, nan

import torch
from torch import Tensor

from ..engines import Engine, ResidentEngine
from .durations import CallDurations
from .request import Request
from .waiting_line import WaitingLine

MOST, MOST_ON_CUDA = 4, 64
"""Images of a call: few enough that none waits long for the others, enough to hide what a call costs."""

STREAMS = 3
"""CUDA streams with a call each."""

LOOKS_AHEAD = 64
"""Waiting images whose deadlines are looked at before an image with a deadline begins."""

REPETITIONS = 3


class Calls:
    """workers: threads that run `work`. most: images of a call. durations: of calls on single images.

    running: images under way.
    """

    def __init__(
        self,
        line: WaitingLine,
        engine: Engine,
        workers: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        on_cuda = engine.plan.device.type == "cuda"
        self.line, self.clock, self.device = line, clock, engine.plan.device
        self.workers = workers or (STREAMS if on_cuda else torch.get_num_threads())
        self.most = MOST_ON_CUDA if on_cuda else MOST
        self.durations = CallDurations(seconds_to_exits(engine, clock))
        self._running, self._counting = 0, threading.Lock()
        self._costs = lru_cache(1)(lambda engine: engine.net.cost.tolist())

    def running(self) -> dict[str, int]:
        """Number of images under way; this engine does not say at which stage they are."""
        return {"all": self._running}

    def drop(self) -> list[Request]:
        """Nothing: what is under way ends by itself soon."""
        return []

    @torch.no_grad()
    def work(self) -> None:
        """Until the line is closed and empty."""
        share = None if self.most == MOST_ON_CUDA else self.workers
        with stream_of_its_own(self.device):
            while batch := self.line.take(self.most, together, share=share):
                self._count(len(batch))
                self._answer(batch)
                self._count(-len(batch))

    def _count(self, more: int) -> None:
        with self._counting:
            self._running += more

    def _answer(self, batch: Sequence[Request]) -> None:
        now = self.clock()
        for request in batch:
            request.began = now
        first = batch[0]
        last_exit = self._last_exit(first, now) if first.urgent else None
        try:
            logits, confidence, exits = (part.cpu().numpy() for part in call(batch, last_exit))
            labels, confidence, exits = logits.argmax(1).tolist(), confidence.tolist(), exits.tolist()
        except BaseException as error:
            if len(batch) == 1:
                first.fail(error)
            else:  # the others are answered
                for request in batch:
                    self._answer([request])
            return
        now = self.clock()
        costs = self._costs(first.engine)  # type: ignore[arg-type]
        for request, row, label, at, value in zip(batch, logits, labels, exits, confidence, strict=True):
            request.answer(torch.from_numpy(row), label, at, value, costs[at], now)
        if len(batch) == 1:
            self.durations.add(exits[0], now - first.began)

    def _last_exit(self, request: Request, now: float) -> int:
        """The last exit that it reaches before its deadline, and early enough for those that wait to reach their first.

        All workers are taken to begin their next image when this one is done.
        """
        first = self.durations.to(0)
        waiting = enumerate(self.line.deadlines(LOOKS_AHEAD))
        until = min((deadline - (i // self.workers + 1) * first for i, deadline in waiting), default=inf)
        return self.durations.last_exit(min(until, request.deadline) - now)


def together(taken: Sequence[Request], request: Request) -> bool:
    """An image with a deadline gets a call of its own, since all images of a call are answered at its end."""
    return not taken or (taken[0].alike(request) and not taken[0].urgent and not request.urgent)


def answer_in_one_call(requests: Sequence[Request], clock: Callable[[], float]) -> None:
    """One by one, each carried to its exit; for engines, or images, that the server cannot stop between exits."""
    for request in requests:
        try:
            logits, confidence, exits = (
                part[0].cpu() for part in call([request], 0 if request.deadline < clock() else None)
            )
            cost = float(request.engine.net.cost[int(exits)])
        except BaseException as error:
            request.fail(error)
        else:
            request.answer(logits, int(logits.argmax()), int(exits), float(confidence), cost, clock())


Answers = tuple[Tensor, Tensor, Tensor]
"""Logits [N, K], confidence [N] float32, exits [N] int64."""


def call(batch: Sequence[Request], last_exit: int | None = None) -> Answers:
    """The answers to requests that are alike; last_exit: where all exit at the latest."""
    first = batch[0]
    images = first.image if len(batch) == 1 else torch.cat([request.image for request in batch])
    limits = first.limits
    if last_exit is not None or limits.dim() == 2 or any(request.limits is not limits for request in batch):
        columns = [r.limits if r.limits.dim() == 2 else r.limits[:, None] for r in batch]
        limits = torch.cat(columns, dim=1)
    if last_exit is not None:
        limits[last_exit:] = nan
    return run(first.engine, images, limits)


def run(engine: Engine, images: Tensor, limits: Tensor) -> Answers:
    """On the calling thread alone where the engine can.

    Of the resident engine only the op: every other op of PyTorch gives Python's lock away, and in a process that is
    busy with HTTP a thread waits long for it.
    """
    if isinstance(engine, ResidentEngine):
        rule = engine.rule_of(None)
        assert rule is None or isinstance(rule, Tensor)
        return engine.program.run(images, limits, engine.plan.criterion, engine.net.num_classes, 1, rule=rule)
    result = engine.run(images, limits)
    return result.logits, result.confidence, result.exit_index


@torch.no_grad()
def seconds_to_exits(engine: Engine, clock: Callable[[], float]) -> list[float]:
    """Median seconds of a call on one image that exits at exit 0 … n."""
    net = engine.net
    weight = next(net.parameters())
    channels, *sides = net.input_shape
    shape = channels, *(sides[1:] if net.rows_as_maps else sides)
    image = engine.prepare(torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device))
    never, found = engine.criterion.never, []
    for last in range(net.num_exits + 1):
        values = [never] * last + [nan] * (net.num_exits - last)
        limits = torch.tensor(values, dtype=torch.float32, device=weight.device)[:, None]
        spans = []
        for _ in range(REPETITIONS):
            begin = clock()
            run(engine, image, limits)[2].tolist()
            spans.append(clock() - begin)
        found.append(max(statistics.median(spans), 1e-9))
    return found


@contextmanager
def stream_of_its_own(device: torch.device) -> Iterator[None]:
    """On CUDA calls of several threads overlap in streams of their own."""
    context: AbstractContextManager[object] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.default_stream(device))
        context = torch.cuda.stream(stream)
    with context:
        yield
