"""The resident engine on images that come one by one: C++ threads that answer each as soon as it exits."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import CPP_MISSING, define

define(
    "resident_loop_open(Tensor images, Tensor steps, Tensor maps, Tensor groups, Tensor packed, Tensor thresholds,"
    " str criterion, int num_classes, bool bfloat16, Tensor? image, Tensor? rule, int workers, Tensor(a!) counts)"
    " -> int"
)
define("resident_loop_put(int loop, Tensor images, Tensor limits, int ticket, float arrived, float deadline) -> ()")
define("resident_loop_take(int loop, float delay) -> (Tensor, Tensor)")
define("resident_loop_cancel(int loop, int ticket) -> ()")
define("resident_loop_close(int loop, bool drop) -> ()")
define("resident_loop_free(int loop) -> ()")

available = CPP_MISSING is None
"""Whether there are such loops: only in C++, since they are threads; what they compute has the ops' references."""


class ResidentLoop:
    """Threads that answer images by a resident program on the CPU.

    They choose between any two steps which images go on: first those that are there for twice as long as an image
    takes, then those that have just come, to their first exit, then those before another early exit, then those before
    the final one; among these the oldest one, with others that wait for the same steps. An image with a deadline goes
    to its first exit before all others. An answer has the same bits as that of `resident_forward` or `resident_int8`.

    tables: steps, maps, groups and packed, as of these ops. shape: (C, H, W) of the images. num_exits: early ones.
    image: as of `resident_int8`, None for floats. rule: as of the ops. workers: threads.
    counts: number of images that wait, then of those that have begun by the number of exits that they have passed; kept
        up to date by the threads. It can be read at any time without a lock.

    Raises `RuntimeError` as the ops do.
    """

    def __init__(
        self, tables: Sequence[Tensor], shape: Sequence[int], num_exits: int, criterion: str, num_classes: int,
        bfloat16: bool, image: Tensor | None, rule: Tensor | None, workers: int,
    ) -> None:  # fmt: skip
        counts = torch.zeros(num_exits + 2, dtype=torch.int64)
        self.counts, self._process = counts.numpy().data, os.getpid()
        dtype = torch.float32 if image is None else torch.uint8
        self._number: int = torch.ops.eefast.resident_loop_open.default(
            torch.empty(0, *shape, dtype=dtype), *tables, torch.zeros(num_exits, dtype=torch.float32), criterion,
            num_classes, bfloat16, image, rule, workers, counts,
        )  # fmt: skip
        ops = torch.ops.eefast
        self._put, self._take = ops.resident_loop_put.default, ops.resident_loop_take.default

    def put(self, images: Tensor, limits: Tensor, ticket: int, arrived: float, deadline: float) -> None:
        """images: [N, C, H, W] float32 or, of integers, also uint8. limits: [n] or [n, 1] float32, or [n, N], as the
            ops' thresholds. Both are copied.
        ticket: of the first one, larger than all before; those of the others follow. arrived, deadline: seconds of
            `time.perf_counter`, without a deadline infinite; an image exits at the last exit that it reaches in time,
            at the first one in any case.
        """
        self._put(self._number, images, limits, ticket, arrived, deadline)

    def take(self, delay: float) -> tuple[Tensor, Tensor]:
        """Waits for answers, returns all that there are; none when the loop is closed and all were taken.

        Half a millisecond has to pass after the last call, unless an answer has a deadline or many are there: each
        time that a thread is woken costs as much as an early exit.

        delay: seconds that lately passed from an answer to the one who waits for it, which deadlines account for.

        Returns [N, 6] float64, ticket, label, exit index, confidence, when its work began and when it was answered; and
        logits [N, K] float32. An image that was cancelled or dropped has exit index -1, and no other figures.
        """
        return self._take(self._number, delay)  # type: ignore[no-any-return]

    def cancel(self, ticket: int) -> None:
        """It is computed no further; `take` returns it all the same. Does nothing for one that it has returned."""
        torch.ops.eefast.resident_loop_cancel.default(self._number, ticket)

    def close(self, drop: bool = False) -> None:
        """No more images; those that wait are answered, or dropped. May be called again, and after `free`."""
        torch.ops.eefast.resident_loop_close.default(self._number, drop)

    def free(self) -> None:
        """Closes, drops and waits for the threads; the last call. Nothing in a process forked since, which has none."""
        if os.getpid() == self._process:
            torch.ops.eefast.resident_loop_free.default(self._number)
