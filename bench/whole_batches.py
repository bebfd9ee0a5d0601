"""Images that arrive one by one → batches of what has arrived → futures, all of a batch done at its end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import Tensor

import eefast
from eefast.serving import Answer


class WholeBatches:
    """What `eefast.serving.Server` is compared with, by the same client. most: images of a batch.

    A context manager; leaving it answers what waits.
    """

    def __init__(self, fast: eefast.Accelerated, most: int) -> None:
        self.fast, self.most = fast, most
        self.waiting: SimpleQueue[tuple[Tensor, float, Future[Answer]] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def submit(self, image: Tensor, deadline: float | None = None) -> Future[Answer]:
        """image: [C, H, W], not written to until it is answered."""
        future: Future[Answer] = Future()
        self.waiting.put((image, time.perf_counter(), future))
        return future

    @torch.no_grad()
    def _work(self) -> None:
        while (first := self.waiting.get()) is not None:
            batch, end = [first], False
            while len(batch) < self.most and not end:
                try:
                    other = self.waiting.get_nowait()
                except Empty:
                    break
                if other is None:
                    end = True
                else:
                    batch.append(other)
            began = time.perf_counter()
            found = self.fast(torch.stack([image for image, _, _ in batch]))
            now = time.perf_counter()
            numbers = (part.tolist() for part in (found.labels, found.exit_index, found.confidence, found.cost))
            for (_, came, future), logits, label, at, confidence, cost in zip(
                batch, found.logits.unbind(), *numbers, strict=True
            ):
                future.set_result(Answer(label, logits, at, confidence, cost, began - came, now - began, False))
            if end:
                return

    def __enter__(self) -> WholeBatches:
        return self

    def __exit__(self, *_: Any) -> None:
        self.waiting.put(None)
        self.thread.join()
