"""A process of its own: a job and shards from a pipe → messages of what became of each."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

PROGRESS_SECONDS = 0.5


def main(descriptor: int) -> None:
    """Run until the other end of the pipe is closed, as it is when the process that started this one has ended.

    Messages: ("ready", plan), ("refused", error), ("done", number of the shard, totals), ("failed", number, error),
    ("progress", `pipeline.Answered`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    pipe = _Pipe(descriptor)
    import torch

    from .pipeline import Pipeline

    content = pipe.recv()
    try:
        job = pickle.loads(content)
    except (AttributeError, ImportError) as error:  # a class of the script that started the run
        pipe.send("refused", f"a worker cannot make the network again ({error}); move its classes into a module")
        return
    torch.set_num_threads(job.threads)
    try:
        pipeline = Pipeline(job)
    except (ValueError, RuntimeError) as error:
        pipe.send("refused", str(error))
        return
    pipe.send("ready", pipeline.plan)
    threading.Thread(target=_tell_progress, args=(pipe, pipeline), daemon=True).start()
    while True:
        shard = pipe.recv()
        pipeline.submit(shard).add_done_callback(partial(_tell, pipe, shard.number))


class _Pipe:
    """Sends from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._connection, self._lock = Connection(descriptor), threading.Lock()

    def recv(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError):
            os._exit(1)

    def send(self, *message: Any) -> None:
        try:
            with self._lock:
                self._connection.send(message)
        except OSError:
            os._exit(1)


def _tell(pipe: _Pipe, number: int, done: Future[Any]) -> None:
    error = done.exception()
    if error is None:
        pipe.send("done", number, done.result())
    else:
        pipe.send("failed", number, type(error).__name__, str(error) or type(error).__name__)


def _tell_progress(pipe: _Pipe, pipeline: Any) -> None:
    while True:
        time.sleep(PROGRESS_SECONDS)
        pipe.send("progress", pipeline.answered)
