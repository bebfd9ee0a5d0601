"""Shards → files of rows, without a pause between shards: read and decode ahead, answer, write later."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import accelerate
from ..data import cropping
from ..data.decoding import decode, decode_bytes
from ..data.image_files import ImageFileError
from ..model import EarlyExitNet
from ..preprocessing import Preprocessing
from ..result import ExitResult
from . import part_files
from .chunks import Chunk, Content, Shard, Source
from .manifest import LISTING_FILE

AHEAD = 4
"""Batches that wait to be answered; the reader waits when there are more."""
DECODED_TOGETHER = 16
"""Images that a thread decodes before it looks for more work."""


@dataclass(frozen=True)
class Job:
    """What all workers are told; pickled.

    how: images are prepared; None where they are pixels. on_error: "fail" or "record".
    threads: that answer, and as many that decode. Other values as of `eefast.score`.
    """

    net: EarlyExitNet
    source: Source
    output: Path
    digest: str
    how: Preprocessing | None
    on_error: str
    logits: bool
    engine: str
    batch_size: int
    threads: int
    device: str
    stages: str = "auto"


@dataclass
class Answered:
    """What a pipeline has done so far."""

    images: int = 0  # without those that failed
    failed: int = 0
    cost: float = 0.0

    def plus(self, totals: part_files.Totals) -> Answered:
        whole = totals.images - totals.failed
        return Answered(self.images + whole, self.failed + totals.failed, self.cost + totals.cost)

    def since(self, before: Answered) -> Answered:
        """What was done after `before`; counts may arrive late, so never less than nothing."""
        images, failed = max(self.images - before.images, 0), max(self.failed - before.failed, 0)
        return Answered(images, failed, max(self.cost - before.cost, 0.0) if images else 0.0)


@dataclass
class _Task:
    """A shard on its way; its future gets the `Totals` of its rows."""

    shard: Shard
    rows: part_files.Rows
    done: Future[part_files.Totals] = field(default_factory=Future)


@dataclass(frozen=True)
class _Batch:
    """Images of a task: their rows, and pixels [n, C, H, W]; without pixels the end of the task's images."""

    task: _Task
    rows: Any
    images: Tensor | None


class Pipeline:
    """Answers shards in the order in which they are submitted, on threads of this process.

    plan: what runs, in words. answered: counts, which go up while shards are answered.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.answered = job, Answered()
        net = job.net.eval().to(job.device)
        self.fast = accelerate(net, engine=job.engine, frozen=True, stages=job.stages)
        self.plan = str(self.fast.warmup())
        self._todo: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._batches: queue.Queue[_Batch] = queue.Queue(AHEAD)
        self._answered_tasks: queue.Queue[_Task] = queue.Queue(2)
        self._unread = 0  # tasks whose last batch has not been taken from the queue
        self._lock = threading.Lock()
        self._decoders = ThreadPoolExecutor(job.threads, thread_name_prefix="eefast-decode")
        for run in (self._read, self._answer, self._write):
            threading.Thread(target=run, name=f"eefast-score{run.__name__}", daemon=True).start()

    def submit(self, shard: Shard) -> Future[part_files.Totals]:
        """Its rows are in a file when the future is done; it raises `ImageFileError` for an image that ends the run."""
        exits, classes = self.job.net.num_exits + 1, self.job.net.num_classes if self.job.logits else None
        task = _Task(shard, part_files.Rows(shard.count, exits, classes))
        with self._lock:
            self._unread += 1
        self._todo.put(task)
        return task.done

    def _read(self) -> None:
        while True:
            task = self._todo.get()
            try:
                self._read_shard(task)
            except Exception as error:  # goes to whoever waits for the shard
                _fail(task, error)
            self._batches.put(_Batch(task, None, None))

    def _read_shard(self, task: _Task) -> None:
        ahead: deque[_Prepared] = deque()
        chunks = self.job.source.chunks(task.shard, self.job.batch_size, self.job.output / LISTING_FILE)
        for chunk in chunks:
            first = len(task.rows.ids)
            task.rows.ids += chunk.ids
            if isinstance(chunk.images, np.ndarray):
                self._put(task, slice(first, first + len(chunk.ids)), torch.from_numpy(chunk.images))
                continue
            ahead.append(self._prepared(chunk, first))
            if len(ahead) > 2:
                self._collect(task, ahead.popleft())
        while ahead:
            self._collect(task, ahead.popleft())
        if len(task.rows.ids) != task.shard.count:
            raise RuntimeError(
                f"shard {task.shard.number} has {len(task.rows.ids)} images, not {task.shard.count}: the input has "
                "changed since this run began; run the command again"
            )

    def _prepared(self, chunk: Chunk, first: int) -> _Prepared:
        """The chunk's images on their way to be pixels."""
        pixels = np.empty((len(chunk.ids), *self.job.net.input_shape), np.uint8)
        parts = [
            self._decoders.submit(self._decode, chunk, start, min(start + DECODED_TOGETHER, len(pixels)), pixels)
            for start in range(0, len(pixels), DECODED_TOGETHER)
        ]
        return _Prepared(first, pixels, parts)

    def _decode(self, chunk: Chunk, start: int, stop: int, pixels: np.ndarray[Any, Any]) -> dict[int, str]:
        """Write rows start … stop of `pixels`; which of them have none, and why."""
        errors = {}
        for i in range(start, stop):
            try:
                pixels[i] = pixels_of(chunk.images[i], chunk.ids[i], self.job)
            except ImageFileError as error:
                errors[i] = str(error)
        return errors

    def _collect(self, task: _Task, found: _Prepared) -> None:
        errors: dict[int, str] = {}
        for part in found.parts:
            errors |= part.result()
        if not errors:
            self._put(task, slice(found.first, found.first + len(found.pixels)), torch.from_numpy(found.pixels))
            return
        if self.job.on_error == "fail":
            raise ImageFileError(errors[min(errors)])
        task.rows.errors |= {found.first + i: why for i, why in errors.items()}
        self.answered.failed += len(errors)
        whole = np.setdiff1d(np.arange(len(found.pixels)), list(errors))
        if len(whole):
            self._put(task, found.first + whole, torch.from_numpy(found.pixels[whole]))

    def _put(self, task: _Task, rows: Any, images: Tensor) -> None:
        if images.is_floating_point():
            images = images.to(next(self.job.net.parameters()).dtype)
        self._batches.put(_Batch(task, rows, images))

    def _answer(self) -> None:
        while True:
            waiting: deque[_Batch] = deque()
            try:
                for result in self.fast.stream(self._images(waiting)):
                    self._take(waiting, result)
                self._take(waiting, None)
            except Exception as error:  # goes to whoever waits for the shards
                for batch in waiting:
                    _fail(batch.task, error)

    def _images(self, waiting: deque[_Batch]) -> Iterator[Tensor]:
        """Batches until all that was submitted is read; then what is under way must not wait for more to come."""
        first = True
        while first or self._unread:
            first = False
            batch = self._batches.get()
            waiting.append(batch)
            if batch.images is None:
                with self._lock:
                    self._unread -= 1
            else:
                yield batch.images.to(self.job.device)

    def _take(self, waiting: deque[_Batch], result: ExitResult | None) -> None:
        """Put the result of the first waiting batch into its rows; hand on the tasks that ended around it."""
        self._hand_on(waiting)
        if result is not None:
            batch = waiting.popleft()
            rows, where, logits = batch.task.rows, batch.rows, result.logits.cpu().numpy()
            rows.label[where], rows.exit[where] = logits.argmax(1), result.exit_index.cpu().numpy()
            rows.confidence[where], rows.cost[where] = result.confidence.cpu().numpy(), result.cost.cpu().numpy()
            rows.answered[where] = True
            if rows.logits is not None:
                rows.logits[where] = logits
            self.answered.images += len(logits)
            self.answered.cost += float(rows.cost[where].sum())
            self._hand_on(waiting)

    def _hand_on(self, waiting: deque[_Batch]) -> None:
        while waiting and waiting[0].images is None:
            self._answered_tasks.put(waiting.popleft().task)

    def _write(self) -> None:
        while True:
            task = self._answered_tasks.get()
            if task.done.done():
                continue
            try:
                totals = part_files.write(self.job.output, task.shard.number, self.job.digest, task.rows)
            except Exception as error:  # a full disk
                _fail(task, error)
            else:
                task.done.set_result(totals)


@dataclass(frozen=True)
class _Prepared:
    """Pixels that threads are writing, of the images from row `first` on, and their errors by row of `pixels`."""

    first: int
    pixels: np.ndarray[Any, Any]
    parts: Sequence[Future[dict[int, str]]]


def pixels_of(image: Content, name: str, job: Job) -> Any:
    """[C, H, W] uint8; raises `ImageFileError` for an image that has none."""
    if isinstance(image, str):
        raise ImageFileError(f"{name}: {image}")
    if isinstance(image, np.ndarray):
        return image
    assert job.how is not None
    found = decode(image) if isinstance(image, Path) else decode_bytes(image, name)
    return cropping.pixels(found, job.net.input_shape, job.how)


def _fail(task: _Task, error: Exception) -> None:
    if not task.done.done():
        task.done.set_exception(error)
