"""Answer a stream of batches in order while the work goes on across the batches' borders."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import torch
from torch import Tensor

from .result import ExitResult, concatenated

PIECE = 16
"""Images of one piece of work: few enough that nobody waits long for the last one, enough to hide what a call costs."""

OVERLAPPING = 3
"""CUDA streams with a batch each."""

Answer = Callable[[Tensor], ExitResult]
P = TypeVar("P")


def stream(batches: Iterable[Tensor], prepare: Callable[[Tensor], tuple[Answer, Tensor]]) -> Iterator[ExitResult]:
    """Results of all batches, in their order.

    prepare: checks a batch; returns who answers pieces of it, on one thread, and the images.

    Reads ahead until every worker has four pieces to do, and never more than eight pieces for each. Where `batches` or
    `prepare` raises, the results of all batches before come first. Closing the iterator drops what has not begun and
    waits for what has.
    """
    workers = torch.get_num_threads()
    source, error = iter(batches), None
    ahead: deque[list[Future[ExitResult]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="eefast-stream")
    try:
        more = True
        while True:
            while more and _short_of_work(ahead, workers):
                try:
                    answer, x = prepare(next(source))
                except StopIteration:
                    more = False
                except Exception as reason:
                    more, error = False, reason
                else:
                    ahead.append([pool.submit(_answer, answer, part) for part in x.split(PIECE)])
            if not ahead:
                break
            unfinished = next((f for f in ahead[0] if not f.done()), None)
            if unfinished is not None:
                unfinished.exception()  # waits; what it raised comes with the result
            else:
                yield concatenated([f.result() for f in ahead.popleft()])
        if error is not None:
            raise error
    finally:
        pool.shutdown(cancel_futures=True)


def stream_on_cuda(
    batches: Iterable[Tensor], answer: Callable[[Tensor], ExitResult], device: torch.device
) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from kernels that overlap: one in each of a few CUDA streams.

    As soon as a kernel has no more images to start, its finished blocks make room for those of the next one, while
    others still carry their last images. The host never waits; results belong to the current stream. Where `batches` or
    `answer` raises, the results of all batches before come first.
    """
    sides = [torch.cuda.Stream(device) for _ in range(OVERLAPPING)]
    ahead: deque[tuple[ExitResult, torch.cuda.Event]] = deque()
    source, error, count = iter(batches), None, 0
    while True:
        try:
            x = next(source)
            side, current = sides[count % OVERLAPPING], torch.cuda.current_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                result = answer(x)
                done = side.record_event()
            # Memory is handed on in the order of the stream that it was made in.
            x.record_stream(side)
        except StopIteration:
            break
        except Exception as reason:
            error = reason
            break
        ahead.append((result, done))
        count += 1
        if len(ahead) == OVERLAPPING:
            yield _received(*ahead.popleft(), device)
    while ahead:
        yield _received(*ahead.popleft(), device)
    if error is not None:
        raise error


def stream_merging(
    batches: Iterable[Tensor],
    prepare: Callable[[Tensor], tuple[P, Tensor]],
    chunk: Callable[[P], int],
    run: Callable[[P, Iterator[Tensor], int], Generator[ExitResult, None, None]],
) -> Iterator[ExitResult]:
    """Results of all batches, in their order, from an engine that merges survivors of successive chunks of images.

    prepare: checks a batch; returns the plan and the images. chunk: how many images a plan begins together at most.
    run: (plan, chunks, images of the largest chunk) → results of the chunks. A new plan, or another image size, begins
    only when all before is answered. Where `batches` or `prepare` raises, the results of all batches before come first.
    """
    source = iter(batches)
    chunks_of: deque[int] = deque()
    ahead: list[tuple[P, Tensor]] = []

    def next_batch() -> bool:
        for batch in source:
            ahead.append(prepare(batch))
            return True
        return False

    def chunks(plan: P, shape: torch.Size, size: int) -> Iterator[Tensor]:
        while (ahead or next_batch()) and ahead[0][0] is plan and ahead[0][1].shape[1:] == shape:
            parts = ahead.pop()[1].split(size)
            chunks_of.append(len(parts))
            yield from parts

    while ahead or next_batch():
        plan, x = ahead[0]
        size = min(max(len(x), 1), chunk(plan))
        results = run(plan, chunks(plan, x.shape[1:], size), size)
        parts: list[ExitResult] = []
        with closing(results):
            for result in results:
                parts.append(result)
                if len(parts) == chunks_of[0]:
                    chunks_of.popleft()
                    yield concatenated(parts)
                    parts = []


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


@torch.no_grad()
def _answer(answer: Answer, x: Tensor) -> ExitResult:
    return answer(x)
