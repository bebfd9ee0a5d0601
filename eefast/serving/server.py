"""An accelerated network and images that arrive one by one → a future per image, done when its image exits."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..api import Accelerated
from ..engines import Engine
from ..engines.streaming import copied
from ..profiles import limits_of_call
from . import native_line
from .answer import Answer, Closed
from .calls import Calls
from .known_limits import KnownLimits
from .native_line import NativeLine
from .request import Request
from .rows import Rows
from .stages import stage_calls
from .waiting_line import WaitingLine


class Server:
    """Answers images one by one, each as soon as it exits; of any number of threads at a time.

    Images go through the stages together: arrivals join the first stage, survivors wait before theirs, and answers are
    given at every exit. With the resident engine on a CPU a thread in C++ per core chooses between any two steps of the
    network which images go on; on a GPU several calls overlap.

    fast: an accelerated network; `frozen=True` makes `submit` faster. It is warmed up here.
    max_queue: images that may wait.
    workers: threads that answer, with the resident engine; by default as PyTorch has, on a GPU 3.
    clock: seconds that only increase.

    A context manager; leaving it closes the server as `close()` does. Raises `TypeError` and `ValueError` that name
    the argument.
    """

    def __init__(
        self,
        fast: Accelerated,
        max_queue: int = 256,
        workers: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(fast, Accelerated):
            raise TypeError(f"fast is a {type(fast).__name__}; give eefast.accelerate(net)")
        if max_queue < 1:
            raise ValueError(f"max_queue={max_queue} must be at least 1")
        if workers is not None and workers < 1:
            raise ValueError(f"workers={workers} must be at least 1")
        fast.warmup()
        self.fast, self.clock, self._process = fast, clock, os.getpid()
        engine = fast.ready()[0]
        self._line: WaitingLine | NativeLine
        self._known: KnownLimits | None = None
        self._crew: NativeLine | Calls | Rows
        if native_line.runs(engine, clock):
            self._line = self._crew = NativeLine(max_queue, engine, workers)
            threads = self._line.threads
        else:
            self._line = WaitingLine(max_queue)
            if stage_calls(engine) is None:
                self._crew = Calls(self._line, engine, workers, clock)
            else:
                self._crew = Rows(self._line, engine, clock)
            threads = [
                threading.Thread(target=self._crew.work, name=f"eefast-serve-{i}", daemon=True)
                for i in range(self._crew.workers)
            ]
            for thread in threads:
                thread.start()
        self._threads = threads
        # Where it is not closed: when it is collected, or before Python ends.
        self._ended = weakref.finalize(self, _end, self._line, self._crew, self._threads, self._process, 0.0)

    @property
    def max_queue(self) -> int:
        return self._line.most

    def waiting(self) -> int:
        """Number of images that have not begun."""
        return len(self._line)

    def running(self) -> dict[str, int]:
        """Number of images that have begun, by the stage that they wait for, or under "all" where that is not known."""
        return self._crew.running()

    def submit(
        self,
        image: Tensor,
        deadline: float | None = None,
        thresholds: Tensor | Sequence[float] | None = None,
        profile: str | None = None,
        exit_limit: int | None = None,
    ) -> Future[Answer]:
        """A future of the answer to an image [C, H, W], as the network takes them.

        deadline: seconds from now; the image exits at the last exit that it can reach by then, at the first one where
            it can reach none; it is never dropped, and `Answer.late` says whether it was answered too late.
        thresholds: n numbers, by default the network's of this moment, which later changes do not reach; profile,
            exit_limit: see `EarlyExitNet.forward`.

        The image's memory may be written to at once. `future.cancel()` succeeds until there is an answer; what has not
        been computed then never is. An image that the network cannot take fails its own future, with the `TypeError` or
        `ValueError` of `EarlyExitNet.check_images`. Raises `Overloaded` at once where max_queue images wait, `Closed`
        after `close`, `ValueError` for the other arguments.
        """
        return self.submit_all([image], deadline, thresholds, profile, exit_limit)[0]

    def submit_all(
        self,
        images: Sequence[Tensor],
        deadline: float | None = None,
        thresholds: Tensor | Sequence[float] | None = None,
        profile: str | None = None,
        exit_limit: int | None = None,
    ) -> list[Future[Answer]]:
        """A future for each image, see `submit`; `Overloaded` where not all of them may wait, and then none does."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this process was forked from the one that made the server, and has none of its threads; make the "
                "server in this process, started by 'spawn' (multiprocessing.get_context('spawn'))"
            )
        if deadline is not None and not deadline > 0:
            raise ValueError(f"deadline={deadline} must be above 0, in seconds from now")
        self._line.check(len(images))  # before any work: refusing must be cheap where too many come
        plain = thresholds is None and profile is None and exit_limit is None
        if plain and len(images) == 1 and self._known is not None:
            future = self._submit_one(images[0], deadline, self._known)
            if future is not None:
                return [future]
        now = self.clock()
        until = inf if deadline is None else now + deadline
        requests, futures = list[Request](), list[Future[Answer]]()
        with torch.no_grad():
            engine, limits, since = self.fast.ready()
            if self.fast.frozen and isinstance(self._line, NativeLine):
                self._known = KnownLimits(self.fast, engine, limits)
            if not plain:
                net = self.fast.net
                limits, _ = limits_of_call(
                    net.profiles, net.num_exits, engine.plan.criterion, (limits, since), limits.device, 1, profile,
                    thresholds, exit_limit,
                )  # fmt: skip
            for image in prepared(engine, images, not self._line.copies):
                if isinstance(image, Tensor):
                    requests.append(Request(engine, image, limits, now, until))
                    futures.append(requests[-1].future)
                else:
                    failed: Future[Answer] = Future()
                    failed.set_exception(image)
                    futures.append(failed)
        self._line.put(requests)
        return futures

    def _submit_one(self, image: Tensor, deadline: float | None, known: KnownLimits) -> Future[Answer] | None:
        """In two thirds of the time; None where `submit_all` has to look closer, or to say what is wrong."""
        line = self._line
        assert isinstance(line, NativeLine)
        now = self.clock()
        if type(image) is not Tensor or image.dim() != 3 or image.requires_grad or not known.hold():
            return None
        try:
            prepared = known.engine.prepare(image[None])
        except (TypeError, ValueError, RuntimeError):
            return None
        request = Request(known.engine, prepared, known.limits, now, inf if deadline is None else now + deadline)
        line.put_one(request)
        return request.future

    def close(self, drain: float | None = 10.0) -> None:
        """Take no more images; returns when all threads have ended.

        drain: seconds in which images that wait are still answered, None for as long as it takes; those that are not
        fail with `Closed`. What has begun with the resident engine is answered in any case.
        """
        if self._ended.detach():
            _end(self._line, self._crew, self._threads, self._process, drain)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _end(
    line: WaitingLine | NativeLine,
    crew: NativeLine | Calls | Rows,
    threads: Sequence[threading.Thread],
    process: int,
    drain: float | None,
) -> None:
    if os.getpid() != process:  # a fork has none of the threads
        return
    line.close()
    # The garbage collector may call this in any thread.
    threads = [thread for thread in threads if thread is not threading.current_thread()]
    until = None if drain is None else time.monotonic() + drain
    for thread in threads:
        thread.join(None if until is None else max(0.0, until - time.monotonic()))
    for request in line.drop():
        request.fail(Closed("the server was closed before this image was answered"))
    crew.drop()
    for thread in threads:
        thread.join()


def prepared(engine: Engine, images: Sequence[Tensor], copy: bool) -> list[Tensor | Exception]:
    """Images [C, H, W] as the engine takes them, [1, C, H, W]; with `copy` in memory that nothing else writes to.

    In place of one that the network cannot take, the `TypeError` or `ValueError` of `EarlyExitNet.check_images`.
    """
    if len(images) == 1:
        return [_prepared(engine, images[0][None] if isinstance(images[0], Tensor) else images[0], copy)]
    kinds = {(image.shape, image.dtype) if isinstance(image, Tensor) else None for image in images}
    if len(kinds) == 1:
        # Preparing all at once takes far less time, so that the first one begins soon.
        found = _prepared(engine, torch.stack(list(images)) if None not in kinds else images[0], False)
        if isinstance(found, Tensor):
            return list(found.split(1))
    return [_prepared(engine, image[None] if isinstance(image, Tensor) else image, copy) for image in images]


def _prepared(engine: Engine, images: Tensor, copy: bool) -> Tensor | Exception:
    """images: [N, C, H, W]."""
    try:
        if not isinstance(images, Tensor):
            raise TypeError(f"image is a {type(images).__name__}; give a tensor [C, H, W]")
        rank = 3 if engine.net.rows_as_maps else len(engine.net.input_shape) + 1
        if images.dim() != rank:
            sides = "[C, H, W], one image" if rank == 4 else "[C, L], one window"
            raise ValueError(f"image has shape {tuple(images.shape[1:])}; expected {sides}")
        found = engine.prepare(images if images.device == engine.plan.device else images.to(engine.plan.device))
    except (TypeError, ValueError, RuntimeError) as error:
        return error
    shared = copy and found.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    return copied(found) if shared else found
