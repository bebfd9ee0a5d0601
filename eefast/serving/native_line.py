"""Images → loops in C++ that answer each as soon as it exits → futures; of the resident engine on a CPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeGuard

import torch

from ..engines import Engine, ResidentEngine
from .answer import Closed, Overloaded
from .request import Request

SIZES = 2
"""Sizes of images whose loops are kept, since each has its memory and threads."""


def runs(engine: Engine, clock: Callable[[], float]) -> TypeGuard[ResidentEngine]:
    """Whether loops answer images of this engine; they have a clock of their own, that of `time.perf_counter`."""
    return clock is time.perf_counter and isinstance(engine, ResidentEngine) and engine.has_loops


class Run:
    """A loop for one engine, rule and size of images, and the requests that it has, by ticket."""

    def __init__(self, engine: ResidentEngine, shape: tuple[int, ...], workers: int) -> None:
        self.engine, self.shape, self.rule = engine, shape, engine.rule_of(None)
        self.closed = self.ended = False
        self.requests = dict[int, Request]()
        self.takes_bytes = engine.program.image is not None
        self.costs: list[float] = engine.net.cost.tolist()
        self.loop = engine.loop(shape, self.rule, workers)
        self.counts = self.loop.counts

    def takes(self, engine: Engine, shape: tuple[int, ...]) -> bool:
        return self.shape == shape and self.answers_for(engine)

    def answers_for(self, engine: Engine) -> bool:
        """Whether its images are answered as this engine would answer them now."""
        return self.engine is engine and not self.closed and self.rule is engine.rule_of(None)

    def close(self, drop: bool = False) -> None:
        """No more images; those that wait are answered, or fail."""
        self.closed = True
        self.loop.close(drop)

    def work(self) -> None:
        """Resolves futures until the loop is closed and has answered all."""
        delay = 0.0
        while True:
            figures, logits = self.loop.take(delay)
            rows = figures.tolist()
            if not rows:
                self.ended = True
                return self.loop.free()
            for (ticket, label, exit_index, confidence, began, ended), row in zip(rows, logits.unbind(), strict=True):
                request = self.requests.pop(int(ticket))
                if exit_index < 0:
                    request.fail(Closed("the server was closed before this image was answered"))
                    continue
                request.began, at = began, int(exit_index)
                request.answer(row, int(label), at, confidence, self.costs[at], time.perf_counter())
                delay = time.perf_counter() - ended


class NativeLine:
    """Where images wait, and what answers them.

    most: images that may wait. workers: threads of each loop; by default as many as PyTorch has. threads: those of
    Python, one for each loop, which resolve futures.
    """

    copies = True
    """Whether `put` copies the images."""

    def __init__(self, most: int, engine: ResidentEngine, workers: int | None = None) -> None:
        self.most, self.workers = most, workers or torch.get_num_threads()
        self.threads: list[threading.Thread] = []
        self._closed, self._tickets, self._changing = False, 0, threading.Lock()
        self._runs: list[Run] = []
        self._open(engine, tuple(engine.net.input_shape))

    def _open(self, engine: ResidentEngine, shape: tuple[int, ...]) -> Run:
        run = Run(engine, shape, self.workers)
        self.threads[:] = [thread for thread in self.threads if thread.is_alive()]
        self.threads.append(threading.Thread(target=run.work, name=f"eefast-serve-{len(self.threads)}", daemon=True))
        self.threads[-1].start()
        self._runs = [*(other for other in self._runs if not other.ended), run]
        return run

    def __len__(self) -> int:
        runs = self._runs
        return runs[0].counts[0] if len(runs) == 1 else sum(run.counts[0] for run in runs)

    def check(self, count: int) -> None:
        """Raises `Overloaded` where `count` more may not wait, `Closed` where none may; takes no lock."""
        if self._closed:
            raise Closed("this server was closed; make another one")
        if (waiting := len(self)) + count > self.most:
            raise Overloaded(f"{waiting} images wait, max_queue={self.most} may; send {count} again later")

    def put(self, requests: Sequence[Request]) -> None:
        """All of them or none; errors as of `check`. They have the same limits and deadline."""
        with self._changing:
            self.check(len(requests))
            while requests:
                count = next((i for i, other in enumerate(requests) if not other.alike(requests[0])), len(requests))
                self._put(requests[:count])
                requests = requests[count:]

    def put_one(self, request: Request) -> None:
        """As `put`, in less time."""
        with self._changing:
            self.check(1)
            self._put((request,))

    def _put(self, requests: Sequence[Request]) -> None:
        first = requests[0]
        images = first.image if len(requests) == 1 else torch.cat([request.image for request in requests])
        run = self._run(first.engine, tuple(images.shape[1:]))
        if not (run.takes_bytes and images.dtype == torch.uint8):
            images = images.float()
        ticket, self._tickets = self._tickets, self._tickets + len(requests)
        for i, request in enumerate(requests, ticket):
            run.requests[i] = request
            request.future.cancelled_once = partial(run.loop.cancel, i)
        run.loop.put(images, first.limits, ticket, first.arrived, first.deadline)

    def _run(self, engine: Engine, shape: tuple[int, ...]) -> Run:
        """The loop for images. Those of another engine or rule are closed: what waits for them is answered."""
        run = self._runs[-1]
        if run.takes(engine, shape):
            return run
        usable = [run for run in self._runs if run.answers_for(engine)]
        found = next((run for run in usable if run.shape == shape), None)
        kept = [run for run in usable if run is not found][1 - SIZES :]
        for run in self._runs:
            if run is not found and run not in kept:
                run.close()
        if found is None:
            assert isinstance(engine, ResidentEngine)
            return self._open(engine, shape)
        self._runs = [*(run for run in self._runs if run is not found), found]
        return found

    def running(self) -> dict[str, int]:
        """Number of images that have begun, by the stage that they are at."""
        columns = zip(*(run.counts[1:].tolist() for run in self._runs), strict=True)
        return {str(i): sum(column) for i, column in enumerate(columns)}

    def close(self) -> None:
        """No more images; those that wait are answered."""
        with self._changing:
            self._closed = True
            for run in self._runs:
                run.close()

    def drop(self) -> list[Request]:
        """What waits is answered no more, its futures fail; none is left to be failed by others."""
        for run in self._runs:
            run.close(drop=True)
        return []
