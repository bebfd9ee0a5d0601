"""The compact engine: a batch per stage, one fused op per exit, the survivors are the batch of the next stage."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..planning.planner import CompactStep, Plan
from ..result import ExitResult
from .schedule import SLOTS, answers

CHUNK = 128
"""Images that begin together at most in a stream without CUDA graphs."""

LEAST = 8
"""Images of the largest chunk from which on merging survivors pays there; single images gain nothing from company."""


def run(plan: Plan, net: EarlyExitNet, x: Tensor, limits: Tensor | None = None) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`; limits: thresholds, by default those of this moment."""
    limits = net.limits()[0] if limits is None else limits
    result = None if plan.graphs is None else plan.graphs.run(net, x, limits)
    return run_eagerly(plan, net, x, limits) if result is None else result


def run_eagerly(plan: Plan, net: EarlyExitNet, x: Tensor, limits: Tensor | None = None) -> ExitResult:
    """Stage by stage; the host waits at every exit. limits as in `run`."""
    n, device = len(x), x.device
    limits = net.limits()[0] if limits is None else limits
    results = Results.empty(n, net)
    order = torch.arange(n, dtype=torch.int32, device=device)
    entries, survivors = (order, order, torch.full((1,), n, dtype=torch.int32, device=device)), n
    features = x.to(plan.dtype, memory_format=torch.channels_last)
    for i, step in enumerate(plan.steps):
        if survivors == 0:
            break
        features = step.stage(features)
        threshold = limits[i] if i < net.num_exits else None
        rows, positions, live = leave(step, i, plan.criterion, threshold, features, entries, results)
        remaining = int(live)  # the one place where the host reads a count
        if 0 < remaining < survivors:
            everyone, features = features, torch.empty_like(features[:remaining])
            ops.gather_survivors.run(everyone, rows[:remaining], live, features)
        entries, survivors = (order[:remaining], positions[:remaining], live), remaining
    return results.of(net)


@dataclass(frozen=True)
class Results:
    """Where the exits write answers: logits [N, K] and confidence [N] float32, exits [N] int64."""

    logits: Tensor
    confidence: Tensor
    exits: Tensor

    @classmethod
    def empty(cls, n: int, net: EarlyExitNet) -> Results:
        device = net.cost.device
        logits = torch.zeros(n, net.num_classes, dtype=torch.float32, device=device)
        return cls(logits, torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device))

    def of(self, net: EarlyExitNet, rows: slice = slice(None)) -> ExitResult:
        exits = self.exits[rows]
        return ExitResult(self.logits[rows], exits, self.confidence[rows], net.cost.index_select(0, exits))


Entries = tuple[Tensor, Tensor, Tensor]
"""The live list: rows of the features, positions in the results, both [M] int32, and [1] int32 how many count."""


def leave(
    step: CompactStep, i: int, criterion: str, threshold: Tensor | None, features: Tensor, entries: Entries,
    results: Results,
) -> Entries:  # fmt: skip
    """Exit i on a stage's features: leavers' answers are written; returns the survivors' entries."""
    seen = step.head_convs(features)
    if step.flatten:
        seen = seen.permute(0, 2, 3, 1).reshape(len(seen), -1, 1, 1)
    linear, written = (step.weight, step.bias), (results.logits, results.confidence, results.exits)
    if step.conv is None:
        return ops.exit_head.run(seen, *linear, threshold, *entries, criterion, i, *written)
    return ops.exit_conv_head.run(seen, *step.conv, *linear, threshold, *entries, criterion, i, *written)


@dataclass(frozen=True)
class Waiting:
    """What waits before a stage of a lane, in memory that stays where it is.

    features: [capacity, C, H, W] channels-last. positions: [capacity, 1, 1, 1] int32. count: [1] int32.
    """

    features: Tensor
    positions: Tensor
    count: Tensor

    @classmethod
    def empty(cls, capacity: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Waiting:
        # Rows that nobody has written yet run along as dead ones, so they must hold numbers.
        return cls(
            torch.zeros(capacity, *shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last),
            torch.zeros(capacity, 1, 1, 1, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )


class Stores:
    """The rows before every stage of every lane, and the answers of all slots; see `lanes.Device`.

    thresholds: [n] float32, by which rows leave; they change only while no rows are there.
    """

    def __init__(self, plan: Plan, net: EarlyExitNet, lanes: int, capacity: int, limits: Tensor) -> None:
        self.plan, self.net, self.capacity, self.stages = plan, net, capacity, len(plan.steps)
        self.order = torch.arange(capacity, dtype=torch.int32, device=net.cost.device)
        self.results = Results.empty(SLOTS * capacity, net)
        self.thresholds = limits.clone()
        self._waiting: list[list[Waiting | None]] = [[None] * self.stages for _ in range(lanes)]

    def _before(self, lane: int, stage: int, features: Tensor) -> Waiting:
        """What waits before a stage of a lane; made when the first features [N, C, H, W] arrive."""
        found = self._waiting[lane][stage]
        if found is None:
            # Made in inference mode they could not be written to outside of it.
            with torch.inference_mode(False):
                found = Waiting.empty(self.capacity, features.shape[1:], self.plan.dtype, features.device)
            self._waiting[lane][stage] = found
        return found

    def put(self, lane: int, images: Tensor, slot: int) -> None:
        first, n = self._before(lane, 0, images), len(images)
        first.features[:n].copy_(images)
        torch.add(self.order[:n], slot * self.capacity, out=first.positions[:n].view(-1))
        first.count.fill_(n)

    def advance(self, lane: int, stage: int, rows: int, counted: bool = False) -> None:
        """A stage and its exit on the first `rows` rows before it; survivors are appended to those before the next.

        counted: by the form of the stage that takes the number of its rows from the device.
        """
        here, step = self._waiting[lane][stage], self.plan.steps[stage]
        assert here is not None
        order, features = self.order[:rows], here.features[:rows]
        features = step.counted(features, None, here.count) if counted and step.counted else step.stage(features)
        early = stage < self.stages - 1
        threshold = self.thresholds[stage] if early else None
        entries = order, here.positions[:rows].view(-1), here.count
        survivors, positions, live = leave(step, stage, self.plan.criterion, threshold, features, entries, self.results)
        if early:
            there = self._before(lane, stage + 1, features)
            features = features.contiguous(memory_format=torch.channels_last)
            ops.gather_survivors.run(features, survivors, live, there.features, there.count)
            ops.gather_survivors.run(positions.view(-1, 1, 1, 1), order, live, there.positions, there.count)
            there.count.add_(live)
        here.count.zero_()

    def take(self, slot: int, size: int) -> ExitResult:
        result = self.results.of(self.net, slice(slot * self.capacity, slot * self.capacity + size))
        return ExitResult(*(part.clone() for part in result))

    def clear(self) -> None:
        for waiting in (w for lane in self._waiting for w in lane if w is not None):
            waiting.count.zero_()


class Eager(Stores):
    """Everything runs as soon as it is queued; for the CPU, where counts are known at once."""

    def launch(self, lane: int, stage: int, rows: int, expected: float) -> None:
        self.advance(lane, stage, rows)

    def count(self, lane: int, stage: int) -> int:
        there = self._waiting[lane][stage]
        assert there is not None
        return int(there.count)


def chunk(plan: Plan) -> int:
    """Images that begin together at most in a stream, so that survivors of two chunks fit before a stage."""
    return CHUNK if plan.graphs is None else max(1, plan.graphs.capacity // 2)


def stream(
    net: EarlyExitNet, plan: Plan, chunks: Iterator[Tensor], size: int, limits: Tensor | None = None
) -> Generator[ExitResult, None, None]:
    """Results of chunks of prepared images, at most `size` each, in order; survivors of several chunks merge.

    limits as in `run`, for all chunks.
    """
    limits, first = net.limits()[0] if limits is None else limits, next(chunks)
    chunks = chain([first], chunks)
    if plan.graphs is not None and plan.graphs.take_hold(net, first, limits):
        yield from plan.graphs.stream(chunks)
        return
    if size < LEAST:
        yield from (run_eagerly(plan, net, x, limits) for x in chunks)
        return
    with torch.inference_mode(False):
        stores = Eager(plan, net, 1, 2 * size, limits)
    yield from answers(stores, chunks, lambda stage, most, expected: (True, expected))
