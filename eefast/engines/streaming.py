"""Answer a stream of batches in order while the work goes on across the batches' borders."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..result import ExitResult, concatenated

PIECE = 16
"""Images of one piece of work: few enough that nobody waits long for the last one, enough to hide what a call costs."""

OVERLAPPING = 3
"""CUDA streams with a batch each."""


class Batch(NamedTuple):
    """A checked batch and by what it is to be answered.

    plan: how. images: [N, C, H, W]. limits: [n] float32 thresholds; since: the same object as long as they stay.
    """

    plan: Any
    images: Tensor
    limits: Tensor
    since: object


Read = Callable[[Tensor], Batch]
"""Checks a batch that was handed out and takes its images to memory that nothing else writes to."""

Answer = Callable[[Batch], ExitResult]


def stream(batches: Iterable[Tensor], read: Read, answer: Answer) -> Iterator[ExitResult]:
    """Results of all batches, in their order.

    answer: answers a piece of a batch, on the calling thread alone.

    Reads ahead until every worker has four pieces to do, and never more than eight pieces for each. Where `batches` or
    `read` raises, the results of all batches before come first. Closing the iterator drops what has not begun.
    """
    workers, process = torch.get_num_threads(), os.getpid()
    source, failed = iter(batches), list[Exception]()
    ahead: deque[list[Future[ExitResult]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="eefast-stream")
    try:
        more = True
        while True:
            if os.getpid() != process:
                raise RuntimeError("this stream began in the process that this one was forked from; begin another here")
            while more and _short_of_work(ahead, workers):
                try:
                    batch = read(next(source))
                except StopIteration:
                    more = False
                except Exception as reason:
                    more = False
                    failed.append(reason)
                else:
                    parts = batch.images.split(PIECE)
                    ahead.append([pool.submit(answer, batch._replace(images=part)) for part in parts])
            if not ahead:
                break
            unfinished = next((f for f in ahead[0] if not f.done()), None)
            if unfinished is not None:
                unfinished.exception()  # waits; what it raised comes with the result
            else:
                yield concatenated([f.result() for f in ahead.popleft()])
        if failed:
            raise failed.pop()  # kept nowhere: its traceback knows this frame
    finally:
        # The garbage collector may close a dropped stream in any thread, at any time, also within the start or the end
        # of a thread: waiting for another one could then last for ever.
        pool.shutdown(wait=False, cancel_futures=True)


def stream_on_cuda(batches: Iterable[Tensor], read: Read, answer: Answer, device: torch.device) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from kernels that overlap: one in each of a few CUDA streams.

    read: in the order of the current stream, in which the iterable writes as well. answer: in the order of another one.

    As soon as a kernel has no more images to start, its finished blocks make room for those of the next one, while
    others still carry their last images. The host never waits; results belong to the current stream. Where `batches` or
    `read` raises, the results of all batches before come first.
    """
    sides = [torch.cuda.Stream(device) for _ in range(OVERLAPPING)]
    ahead: deque[tuple[ExitResult, torch.cuda.Event]] = deque()
    source, failed, count = iter(batches), list[Exception](), 0
    while True:
        try:
            batch = read(next(source))
            side, current = sides[count % OVERLAPPING], torch.cuda.current_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = answer(batch)
                done = side.record_event()
            # Memory is handed on in the order of the stream that it was made in.
            for part in (batch.images, batch.limits):
                part.record_stream(side)
        except StopIteration:
            break
        except Exception as reason:
            failed.append(reason)
            break
        ahead.append((result, done))
        count += 1
        if len(ahead) == OVERLAPPING:
            yield _received(*ahead.popleft(), device)
    while ahead:
        yield _received(*ahead.popleft(), device)
    if failed:
        raise failed.pop()


def stream_merging(
    batches: Iterable[Tensor],
    read: Read,
    chunk: Callable[[Any], int],
    run: Callable[[Any, Iterator[Tensor], int, Tensor], Generator[ExitResult, None, None]],
) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from an engine that merges survivors of successive chunks of images.

    chunk: how many images a plan begins together at most. run: (plan, chunks, images of the largest chunk, thresholds)
    → results of the chunks. A new plan, new thresholds or another image size begin only when all before is answered.
    Where `batches` or `read` raises, the results of all batches before come first.
    """
    source = iter(batches)
    chunks_of: deque[int] = deque()
    ahead: list[Batch] = []

    def next_batch() -> bool:
        for batch in source:
            ahead.append(read(batch))
            return True
        return False

    def chunks(first: Batch, size: int) -> Iterator[Tensor]:
        while (ahead or next_batch()) and _alike(ahead[0], first):
            parts = ahead.pop().images.split(size)
            chunks_of.append(len(parts))
            yield from parts

    while ahead or next_batch():
        first = ahead[0]
        size = min(max(len(first.images), 1), chunk(first.plan))
        results = run(first.plan, chunks(first, size), size, first.limits)
        parts: list[ExitResult] = []
        with closing(results):
            for result in results:
                parts.append(result)
                if len(parts) == chunks_of[0]:
                    chunks_of.popleft()
                    yield concatenated(parts)
                    parts = []


def _alike(a: Batch, b: Batch) -> bool:
    """Whether images of both may run together."""
    return a.plan is b.plan and a.since is b.since and a.images.shape[1:] == b.images.shape[1:]


def copied(images: Tensor) -> Tensor:
    """The same images in memory of their own; on the CPU copied by the calling thread alone.

    OpenMP's threads, with which PyTorch copies, go on spinning after their work and take the time of the stream's.
    """
    if images.device.type != "cpu":
        return images.clone()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    return torch.from_numpy(images.detach().view(integers).numpy().copy(order="K")).view(images.dtype)


def _received(result: ExitResult, done: torch.cuda.Event, device: torch.device) -> ExitResult:
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for part in result:
        part.record_stream(current)
    return result


def _short_of_work(ahead: deque[list[Future[ExitResult]]], workers: int) -> bool:
    """Whether to read on: workers might wait, and finished results do not pile up."""
    pieces = [f for batch in ahead for f in batch]
    return len(pieces) < 8 * workers and sum(not f.done() for f in pieces) < 4 * workers
