"""A device as two clocks, the host's and the device's: what launches, kernels and waits would take, for tests."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from eefast.engines.host_reads import Times
from eefast.result import ExitResult


class Clock:
    """Rows exit at random, by the shares in `times`; see `eefast.engines.schedule.Device`.

    counted: (stage, rows at most, rows expected) → whether the stage runs in its device-counted form.
    """

    def __init__(
        self, times: Times, queues: int, counted: Callable[[int, int, float], bool], seed: int, capacity: int
    ) -> None:
        self.times, self.stages, self.capacity, self.counted = times, len(times.stages), capacity, counted
        self.host = self.device = self.idle = 0.0
        self.done = [0.0] * queues
        self.waiting = [[0] * self.stages for _ in range(queues)]
        self.random = random.Random(seed)
        self.answered = self.waits = self.exposed = 0

    def put(self, queue: int, images: Tensor, slot: int) -> None:
        self.waiting[queue][0] = len(images)

    def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
        live, self.waiting[queue][stage] = self.waiting[queue][stage], 0
        assert live <= rows
        self.host += self.times.launch
        form = self.times.counted[stage]
        if form is not None and self.counted(stage, rows, expected):
            seconds = form.fixed + form.row * live
        else:
            seconds = next(
                s for size, s in zip(self.times.sizes, self.times.stages[stage], strict=True) if size >= rows
            )
        self.idle += max(0.0, self.host - self.device)
        self.device = self.done[queue] = max(self.host, self.device) + seconds
        last = stage == self.stages - 1
        share = 0.0 if last else self.times.survivors[stage]
        on = sum(self.random.random() < share for _ in range(live))
        self.answered += live - on
        if not last:
            self.waiting[queue][stage + 1] += on

    def count(self, queue: int, stage: int) -> int:
        self.waits += 1
        self.exposed += self.done[queue] == self.device
        self.host = max(self.host, self.done[queue] + self.times.wait - self.times.launch)
        return self.waiting[queue][stage]

    def take(self, slot: int, size: int) -> ExitResult:
        return ExitResult(*(torch.empty(size) for _ in range(4)))

    def clear(self) -> None:
        self.waiting = [[0] * self.stages for _ in self.waiting]

    @property
    def seconds(self) -> float:
        return max(self.host, self.device)
