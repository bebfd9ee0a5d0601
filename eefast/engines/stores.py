"""Memory of the compact engine: rows that wait before every stage, and where the exits write their answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..criteria import Step
from ..model import EarlyExitNet
from ..result import ExitResult
from ..system.openmp import one_thread
from .program import CompactStep, Plan
from .python_exits import Entries, exit_in_python
from .schedule import SLOTS, Chunk, OfEach


@dataclass(frozen=True)
class Results:
    """Where the exits write answers: logits [N, K] and confidence [N] float32, exits [N] int64."""

    logits: Tensor
    confidence: Tensor
    exits: Tensor

    @classmethod
    def empty(cls, n: int, net: EarlyExitNet) -> Results:
        device = net.cost.device
        logits, confidence = (
            torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((n, net.num_classes), (n,))
        )
        return cls(logits, confidence, torch.zeros(n, dtype=torch.int64, device=device))

    def of(self, net: EarlyExitNet, rows: slice = slice(None)) -> ExitResult:
        exits = self.exits[rows]
        return ExitResult(self.logits[rows], exits, self.confidence[rows], net.cost.index_select(0, exits))


def exit_at(
    step: CompactStep, i: int, criterion: str, threshold: Tensor | None, seen: Tensor, entries: Entries,
    results: Results, rule: Tensor | Step | None = None,
) -> Entries:  # fmt: skip
    """Exit i: the answers of samples that exit are written; returns the survivors' entries.

    seen: what the exit reads, as the step returns it. rule: of a criterion that carries, [n + 1, 9] float32 or in
    Python; then survivors' answers so far are written, too.
    """
    if not step.with_head:
        seen = step.head_convs(seen)
        seen = seen.permute(0, 2, 3, 1).reshape(len(seen), -1, 1, 1) if step.flatten else seen
    linear, written = (step.weight, step.bias), (results.logits, results.confidence, results.exits)
    if rule is not None and not isinstance(rule, Tensor):
        return exit_in_python(rule, i, linear, threshold, seen, entries, written)
    last = (criterion, i, *written) if rule is None else ("carried", i, *written, rule[i])
    if step.conv is None:
        return ops.exit_head.run(seen, *linear, threshold, *entries, *last)
    return ops.exit_conv_head.run(seen, *step.conv, *linear, threshold, *entries, *last)


@dataclass(frozen=True)
class Waiting:
    """What waits before a stage of a queue, in memory that stays where it is.

    features: [capacity, C, H, W]. positions: [capacity, 1, 1, 1] int32. count: [1] int32.
    """

    features: Tensor
    positions: Tensor
    count: Tensor

    @classmethod
    def empty(
        cls, capacity: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> Waiting:
        # Rows that were never written run along as dead ones, so they must hold numbers.
        return cls(
            torch.zeros(capacity, *shape, dtype=dtype, device=device).contiguous(memory_format=layout),
            torch.zeros(capacity, 1, 1, 1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


@dataclass(frozen=True)
class InPlace:
    """Survivors that were not copied: features [N, C, H, W] of a stage, rows [N] int32 of those that wait."""

    features: Tensor
    rows: Tensor


class Stores:
    """The rows before every stage of every queue, and the answers of all slots; see `schedule.Device`.

    thresholds: [n] float32, by which rows exit; they change only while no rows are there. Or of each image, [n, N] for
        any N, whose values `put` writes.
    rule: see `exit_at`; a table changes as the thresholds do.
    """

    def __init__(
        self, net: EarlyExitNet, plan: Plan, steps: Sequence[CompactStep], queues: int, capacity: int,
        thresholds: Tensor, rule: Tensor | Step | None = None,
    ) -> None:  # fmt: skip
        self.net, self.plan, self.steps = net, plan, steps
        self.capacity, self.stages = capacity, len(steps)
        self.order = torch.arange(capacity, dtype=torch.int32, device=net.cost.device)
        self.zero = torch.zeros(1, dtype=torch.int32, device=net.cost.device)
        self.results = Results.empty(SLOTS * capacity, net)
        self.of_each = thresholds.dim() == 2
        self.thresholds = thresholds.clone()
        self.rule = rule.clone() if isinstance(rule, Tensor) else rule
        if self.of_each:
            self.thresholds = thresholds.new_zeros(len(thresholds), SLOTS * capacity)
        self._waiting: list[list[Waiting | None]] = [[None] * self.stages for _ in range(queues)]

    def before(self, queue: int, stage: int) -> Waiting:
        """What waits before a stage of a queue; there must have been rows, see `_made_before`."""
        found = self._waiting[queue][stage]
        assert found is not None
        return found

    def _made_before(self, queue: int, stage: int, features: Tensor) -> Waiting:
        """What waits before a stage of a queue; made when the first features [N, C, H, W] arrive."""
        if self._waiting[queue][stage] is None:
            # Made in inference mode they could not be written to outside of it.
            with torch.inference_mode(False):
                shape, layout = features.shape[1:], self.steps[stage].layout
                dtype = features.dtype if stage else self.plan.dtype  # autocast may have changed it
                made = Waiting.empty(self.capacity, shape, dtype, features.device, layout)
            self._waiting[queue][stage] = made
        return self.before(queue, stage)

    def put(self, queue: int, chunk: Chunk, slot: int) -> None:
        images = chunk.images if isinstance(chunk, OfEach) else chunk
        first, n = self._made_before(queue, 0, images), len(images)
        first.features[:n].copy_(images)
        keep_until_done(images)
        if isinstance(chunk, OfEach):
            keep_until_done(chunk.thresholds)
            self.thresholds[:, slot * self.capacity : slot * self.capacity + n].copy_(chunk.thresholds)
        torch.add(self.order[:n], slot * self.capacity, out=first.positions[:n].view(-1))
        first.count.fill_(n)

    def advance(
        self, queue: int, stage: int, rows: int, counted: bool = False, source: InPlace | None = None,
        leaves: bool = False,
    ) -> InPlace | None:  # fmt: skip
        """A stage and its exit on the first `rows` rows before it; survivors are appended to those before the next.

        counted: by the form of the stage that takes the number of its rows from the device.
        source: where their features are, which the stage then reads through its form for that.
        leaves: the survivors' features stay where they are, and are returned; no others wait before the next stage.
        """
        here, step = self.before(queue, stage), self.steps[stage]
        order, features = self.order[:rows], here.features[:rows]
        if source is not None and step.through is not None:
            features = seen = step.through(source.features, source.rows[:rows], here.count)
        elif counted and step.counted:
            features = seen = step.counted(features, None, here.count)
        else:
            features, seen = step.run(features)
        early = stage < self.stages - 1
        threshold = self.thresholds[stage] if early else None
        entries = order, here.positions[:rows].view(-1), here.count
        survivors, positions, live = exit_at(
            step, stage, self.plan.criterion, threshold, seen, entries, self.results, self.rule
        )
        if early:
            there = self._made_before(queue, stage + 1, features)
            features = features.contiguous(memory_format=self.steps[stage + 1].layout)
            if not leaves:
                ops.gather_survivors.run(features, survivors, live, there.features, there.count)
            ops.gather_survivors.run(positions.view(-1, 1, 1, 1), order, live, there.positions, there.count)
            there.count.add_(live)
        here.count.zero_()
        return InPlace(features, survivors) if leaves else None

    def settle(self, queue: int, stage: int, source: InPlace) -> None:
        """Copy what waits before a stage from where it was left: others come to it, or the stage cannot read it."""
        here = self.before(queue, stage)
        ops.gather_survivors.run(source.features, source.rows, here.count, here.features, self.zero)

    def take(self, slot: int, size: int) -> ExitResult:
        result = self.results.of(self.net, slice(slot * self.capacity, slot * self.capacity + size))
        return ExitResult(*(part.clone() for part in result))

    def clear(self) -> None:
        for waiting in (w for queue in self._waiting for w in queue if w is not None):
            waiting.count.zero_()


class EagerStores(Stores):
    """Everything runs as soon as it is queued; for the CPU, where counts are known at once.

    in_one_thread: as of `CompactEngine`.
    """

    def __init__(self, *given: Any, in_one_thread: bool = False) -> None:
        super().__init__(*given)
        self.in_one_thread = in_one_thread

    def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
        with one_thread(self.in_one_thread):
            self.advance(queue, stage, rows)

    def count(self, queue: int, stage: int) -> int:
        return int(self.before(queue, stage).count)


def keep_until_done(part: Tensor) -> None:
    """On a GPU memory is handed on when the current stream is done with it, too, not only the one that it is from."""
    if part.is_cuda:
        part.record_stream(torch.cuda.current_stream(part.device))
