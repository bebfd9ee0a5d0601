"""Answer a stream of batches in order while the work goes on across the batches' borders."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..result import ExitResult, concatenated
from .engine import Batch, Rule
from .schedule import Chunk, OfEach

PIECE = 16
"""Images of one piece of work: few enough that the last one is soon done, enough to hide what a call costs."""

ALONE = 64
"""The same where one thread works: no other one has to wait for its last piece, and threads of the user that hold
Python's lock, such as one that decodes images, delay it between pieces."""

OVERLAPPING = 3
"""CUDA streams with a launch each."""

SHARED, MOST_SHARING = 2048, 8
"""Images and batches of one launch at most, where several batches share it."""

AT_ONCE = 5e-4
"""Seconds in which a source hands out a batch that is to wait for the next one."""

T = TypeVar("T")

Run = Callable[[Tensor, Tensor, Rule], ExitResult]
"""(prepared images, thresholds, rule) → answers."""

Merged = Callable[[Iterator[Chunk], int, Tensor, Rule], Iterator[ExitResult]]
"""(chunks of prepared images, images of the largest chunk, thresholds, rule) → results of the chunks, in order."""

# Where `batches` raises, in all of these, the results of all batches before come first.


def stream_in_threads(batches: Iterable[Batch], run: Run) -> Iterator[ExitResult]:
    """Results of all batches, in their order.

    run: answers a piece of a batch, on the calling thread alone.

    Reads ahead until every worker has four pieces to do, and never more than eight pieces for each. Closing the
    iterator drops what has not begun.
    """
    workers, process = torch.get_num_threads(), os.getpid()
    size = PIECE if workers > 1 else ALONE
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
                    batch = next(source)
                except StopIteration:
                    more = False
                except Exception as reason:
                    more = False
                    failed.append(reason)
                else:
                    ahead.append([pool.submit(run, *part, batch.rule) for part in pieces(batch, size)])
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
        # of a thread: waiting for another one could then last forever.
        pool.shutdown(wait=False, cancel_futures=True)


def stream_on_cuda(batches: Iterable[Batch], run: Run, device: torch.device) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from kernels that overlap: one in each of a few CUDA streams.

    batches: read in the order of the current stream. run: in the order of another one, the same answers in any company.

    As soon as a kernel has no more images to start, its finished blocks make room for those of the next one, while
    others still carry their last images. Small batches that come at once share a launch, since the host would take
    longer to queue one for each than the GPU to answer it; those of a slow source do not wait for one another. The host
    never waits; results belong to the current stream.
    """
    sides = [torch.cuda.Stream(device) for _ in range(OVERLAPPING)]
    ahead: deque[_Launched] = deque()
    failed = list[Exception]()
    for count, (group, sizes) in enumerate(_groups_at_once(batches, failed, device)):
        try:
            ahead.append(_launched(group, sizes, run, sides[count % OVERLAPPING], device))
        except Exception as reason:
            failed[:] = [reason]
            break
        if len(ahead) == OVERLAPPING:
            yield from _received(ahead.popleft(), device)
    while ahead:
        yield from _received(ahead.popleft(), device)
    if failed:
        raise failed.pop()


def _groups_at_once(
    batches: Iterable[Batch], failed: list[Exception], device: torch.device
) -> Iterator[tuple[list[Batch], list[int]]]:
    """Batches that share a launch, and their sizes; what their source raises is in `failed`, and ends them.

    A batch waits for the next one only where it was read quickly itself.
    """
    source, group, sizes, images = iter(batches), list[Batch](), list[int](), 0
    while True:
        begin = time.perf_counter()
        try:
            batch = next(source)
        except StopIteration:
            break
        except Exception as reason:
            failed.append(reason)
            break
        slow, size = time.perf_counter() - begin > AT_ONCE, batch.images.shape[0]
        if group and not (images + size <= SHARED and _share(group[0], batch)):
            read_on = torch.cuda.current_stream(device)
            yield group, sizes
            group, sizes, images = [], [], 0
            if (current := torch.cuda.current_stream(device)) != read_on:
                current.wait_stream(read_on)
                batch.images.record_stream(current)
                batch.thresholds.record_stream(current)
                if isinstance(batch.rule, Tensor):
                    batch.rule.record_stream(current)
        group.append(batch)
        sizes.append(size)
        images += size
        if slow or len(group) == MOST_SHARING or images >= SHARED:
            yield group, sizes
            group, sizes, images = [], [], 0
    if group:
        yield group, sizes


def _share(a: Batch, b: Batch) -> bool:
    """Whether one launch may answer both."""
    return _alike(a, b) and a.images.dtype == b.images.dtype and a.thresholds.dim() == 1


class _Launched(NamedTuple):
    """result: of all batches of a launch, which have `sizes` images, from `done` on."""

    result: ExitResult
    sizes: list[int]
    done: torch.cuda.Event


def _launched(
    group: list[Batch], sizes: list[int], run: Run, side: torch.cuda.Stream, device: torch.device
) -> _Launched:
    first = group[0]
    images = first.images if len(group) == 1 else torch.cat([batch.images for batch in group])
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = run(images, first.thresholds, first.rule)
        done = side.record_event()
    # Memory is handed on in the order of the stream that it was made in.
    for part in (images, first.thresholds, first.rule):
        if isinstance(part, Tensor):
            part.record_stream(side)
    return _Launched(result, sizes, done)


def ordered(results: Generator[T, None, None], wait: Callable[[], None], record: Callable[[], None]) -> Iterator[T]:
    """The same results, from work whose CUDA stream may change between two of them.

    wait, record: what they do happens on the stream that is current then. The consumer may go on, or close the
    iterator, in another thread and on another CUDA stream.
    """
    wait()
    try:
        for result in results:
            record()
            yield result
            wait()
    finally:
        wait()
        results.close()
        record()


def ordered_on_cuda(results: Generator[T, None, None], device: torch.device) -> Iterator[T]:
    """`ordered` by an event; what `results` frees at its end is handed on when its last work is done."""
    done, first = torch.cuda.Event(), torch.cuda.current_stream(device)
    try:
        yield from ordered(
            results,
            lambda: torch.cuda.current_stream(device).wait_event(done),
            lambda: done.record(torch.cuda.current_stream(device)),
        )
    finally:
        first.wait_event(done)


def stream_merging(batches: Iterable[Batch], most: int, merged: Merged) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from an engine that merges survivors of successive chunks of images.

    most: images of a chunk. New thresholds or another image size begin only when all before is answered.
    """
    chunks_of: deque[int] = deque()

    def chunks(group: Iterable[Batch], size: int) -> Iterator[Chunk]:
        for batch in group:
            parts = pieces(batch, size)
            chunks_of.append(len(parts))
            yield from (images if limits.dim() == 1 else OfEach(images, limits) for images, limits in parts)

    for first, group in groups(batches, _alike):
        size = min(max(len(first.images), 1), most)
        results = merged(chunks(group, size), size, first.thresholds, first.rule)
        parts: list[ExitResult] = []
        with closing(results):  # type: ignore[type-var]
            for result in results:
                parts.append(result)
                if len(parts) == chunks_of[0]:
                    chunks_of.popleft()
                    yield concatenated(parts)
                    parts = []


def pieces(batch: Batch, size: int) -> list[tuple[Tensor, Tensor]]:
    """Images, `size` of them or fewer, and their thresholds."""
    images = batch.images.split(size)
    if batch.thresholds.dim() == 1:
        return [(part, batch.thresholds) for part in images]
    return list(zip(images, batch.thresholds.split(size, dim=1), strict=True))


def groups(items: Iterable[T], alike: Callable[[T, T], bool]) -> Iterator[tuple[T, Iterator[T]]]:
    """Cut a stream where an item is not like the first of its group: the first of each group, and the whole group.

    An item is read when it is asked for, so a group must be read to its end before the next one is asked for.
    """
    source, ahead = iter(items), list[T]()

    def read() -> bool:
        for item in source:
            ahead.append(item)
            return True
        return False

    def group(first: T) -> Iterator[T]:
        while (ahead or read()) and alike(ahead[0], first):
            yield ahead.pop()

    while ahead or read():
        yield ahead[0], group(ahead[0])


def _alike(a: Batch, b: Batch) -> bool:
    """Whether images of both may run together."""
    here, there = a.images.shape, b.images.shape
    return a.since is b.since and a.rule is b.rule and (here == there or here[1:] == there[1:])


def copied(images: Tensor) -> Tensor:
    """The same images in new memory; on the CPU copied by the calling thread alone.

    OpenMP's threads, with which PyTorch copies, go on spinning after their work and take the time of the stream's.
    """
    if images.device.type != "cpu":
        return images.clone()
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[images.element_size()]
    return torch.from_numpy(images.detach().resolve_neg().view(integers).numpy().copy(order="K")).view(images.dtype)


def _received(launched: _Launched, device: torch.device) -> Iterator[ExitResult]:
    """The results of each batch, for the stream that is current when it is asked for."""
    result, sizes, done = launched
    # Without gradients parts need not know of what they are views, which takes a fifth of the time.
    split = torch.unsafe_split_with_sizes
    parts = [result] if len(sizes) == 1 else map(ExitResult, *(split(part, sizes) for part in result))
    last = None
    for part in parts:
        current = torch.cuda.current_stream(device)
        if current != last:
            current.wait_event(done)
            for whole in result:
                whole.record_stream(current)
            last = current
        yield part


def _short_of_work(ahead: deque[list[Future[ExitResult]]], workers: int) -> bool:
    """Whether to read on: workers might wait, and finished results do not pile up."""
    pieces = [f for batch in ahead for f in batch]
    return len(pieces) < 8 * workers and sum(not f.done() for f in pieces) < 4 * workers
