"""Shards → worker processes of this machine: spawned, fed two shards ahead, replaced once where one dies."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from .chunks import Shard
from .failures import death, failure
from .part_files import Totals
from .pipeline import Answered, Job

GIVEN = 2
"""Shards that a worker has at a time, so that it need not wait between two."""
TICK_SECONDS = 0.5


class Watcher(Protocol):
    """Is told what happens."""

    def ready(self) -> None:
        """A worker has started, and loaded the network."""

    def done(self, shard: Shard, totals: Totals) -> None:
        """A shard's file is there."""

    def tick(self, more: Sequence[Answered]) -> None:
        """Comes about twice a second; more: what each worker has answered that is not yet in a finished shard."""


# What `worker.main` needs, also where the parent's modules are found by a changed sys.path.
_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
    "from eefast.scoring.worker import main; main(int(sys.argv[1]))"
)


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    pipe: Connection
    given: deque[Shard]
    ready: bool = False
    answered: Answered = field(default_factory=Answered)
    finished: Answered = field(default_factory=Answered)

    def give(self, shard: Shard) -> None:
        self.given.append(shard)
        with suppress(OSError):  # the worker has died, which `wait` tells
            self.pipe.send(shard)


def run_in_processes(job: Job, shards: Sequence[Shard], workers: int, watcher: Watcher) -> None:
    """Answer all shards; returns when their files are there.

    Raises `failures.ScoreError`, `WriteError`, or `ValueError` where the network cannot run as it is asked to; whatever
    the end, no worker is left.
    """
    todo, deaths, running = deque(shards), Counter[int](), list[_Worker]()
    try:
        for number in range(min(workers, len(shards))):
            running.append(_started(job, number))
        while todo or any(worker.given for worker in running):
            for worker in running:
                while worker.ready and todo and len(worker.given) < GIVEN:
                    worker.give(todo.popleft())
            for pipe in wait([worker.pipe for worker in running], TICK_SECONDS):
                worker = next(worker for worker in running if worker.pipe is pipe)
                try:
                    message = worker.pipe.recv()
                except (EOFError, OSError):
                    place = running.index(worker)
                    _mourn(worker, deaths)
                    todo.extendleft(reversed(worker.given))
                    running[place] = _started(job, place)
                else:
                    _hear(worker, message, watcher)
            watcher.tick([worker.answered.since(worker.finished) for worker in running])
    finally:
        for worker in running:
            worker.process.kill()
        for worker in running:
            worker.process.wait()
            worker.pipe.close()


def _hear(worker: _Worker, message: tuple[Any, ...], watcher: Watcher) -> None:
    kind, *more = message
    if kind == "ready":
        worker.ready = True
        watcher.ready()
    elif kind == "refused":
        raise ValueError(more[0])
    elif kind == "failed":
        number, name, text = more
        raise failure(name, text, number)
    elif kind == "progress":
        worker.answered = more[0]
    else:
        number, totals = more
        shard = next(shard for shard in worker.given if shard.number == number)
        worker.given.remove(shard)
        worker.finished = worker.finished.plus(totals)
        watcher.done(shard, totals)


def _mourn(worker: _Worker, deaths: Counter[int]) -> None:
    """Note that a worker died; raises where it must not be replaced."""
    code = worker.process.wait()
    worker.pipe.close()
    name = signal.Signals(-code).name if code < 0 else None
    first = worker.given[0].number if worker.given else None
    deaths[-1 if first is None else first] += 1
    if not worker.ready or deaths[-1 if first is None else first] > 1:
        raise death(first, code, name)


def _started(job: Job, number: int) -> _Worker:
    import torch

    if job.device == "cuda":
        job = replace(job, device=f"cuda:{number % max(torch.cuda.device_count(), 1)}")
    here, there = Pipe()
    threads = {"OMP_NUM_THREADS": str(job.threads)}  # before PyTorch is imported
    try:
        descriptor = there.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", _START, str(descriptor), json.dumps(sys.path)],
            pass_fds=[descriptor],
            stdin=subprocess.DEVNULL,
            stdout=2,  # results go elsewhere, so what a worker prints must not be among this process's
            env={**os.environ, **threads},
        )
    finally:
        there.close()
    with suppress(OSError):
        here.send(pickle.dumps(job))
    return _Worker(process, here, deque())
