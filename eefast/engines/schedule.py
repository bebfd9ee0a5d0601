"""Order the work of the compact engine: chunks of images → which stage runs next, on how many rows; survivors merge."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..result import ExitResult

DELAY = 4
"""Chunks that begin after another one before its survivors no longer wait for company."""

SLOTS = 2 * (DELAY + 2)
"""Chunks whose answers may be under way at a time."""


@dataclass(frozen=True)
class OfEach:
    """Prepared images [N, C, H, W] with thresholds of each, [n, N]."""

    images: Tensor
    thresholds: Tensor

    def __len__(self) -> int:
        return len(self.images)


Chunk = Tensor | OfEach
"""Prepared images [N, C, H, W], answered by the thresholds of all, or with those of each."""

Policy = Callable[[int, int, float], tuple[bool, float]]
"""(stage, rows at most, rows expected) → whether the host reads how many survived, and how many it expects."""


class Device(Protocol):
    """Where rows wait before every stage of every queue, and what runs them.

    stages: their number. capacity: rows that can wait before a stage.
    """

    stages: int
    capacity: int

    def put(self, queue: int, chunk: Chunk, slot: int) -> None:
        """Queue: images wait before the first stage; their answers go to a slot."""

    def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
        """Queue: a stage and its exit on all that waits before it, at most `rows`; survivors wait before the next."""

    def count(self, queue: int, stage: int) -> int:
        """Wait for the queue's last launch: rows that wait before a stage. The one place where the host waits."""

    def take(self, slot: int, size: int) -> ExitResult:
        """The answers in a slot, copied."""

    def clear(self) -> None:
        """Nothing waits anywhere."""


@dataclass
class _Chunks:
    """What the queues share: the source of chunks, numbered, and what it raised."""

    source: Iterator[Chunk]
    sizes: list[int] = field(default_factory=list)
    taken: int = 0
    failed: list[Exception] = field(default_factory=list)
    _next: Chunk | None = None
    _ended: bool = False

    def peek(self) -> Chunk | None:
        """The chunk that comes next, None where there is none."""
        if self._next is None and not self._ended:
            try:
                self._next = next(self.source)
            except StopIteration:
                self._ended = True
            except Exception as error:
                self._ended = True
                self.failed.append(error)
        return self._next

    def pop(self) -> tuple[int, Chunk]:
        """The number of the chunk that comes next, and the chunk."""
        chunk = self.peek()
        assert chunk is not None
        self._next = None
        self.sizes.append(len(chunk))
        return len(self.sizes) - 1, chunk

    @property
    def begun(self) -> int:
        return len(self.sizes)

    @property
    def full(self) -> bool:
        """Whether a new chunk must wait for a slot."""
        return self.begun - self.taken >= SLOTS


@dataclass
class _Waiting:
    """What the host knows of the rows before a stage: at most, expected, and the oldest chunk among them."""

    most: int = 0
    expected: float = 0.0
    oldest: int | None = None

    def add(self, most: int, expected: float, oldest: int) -> None:
        self.most, self.expected = self.most + most, self.expected + expected
        self.oldest = oldest if self.oldest is None else min(self.oldest, oldest)


def answers(
    device: Device, chunks: Iterable[Chunk], policy: Policy, queues: int = 1
) -> Generator[ExitResult, None, None]:
    """Results of all chunks, in their order.

    The queues take turns, so that while one waits for a count the device still has the work of another. Survivors wait
    before a stage until the next ones would not fit, for at most `DELAY` chunks, so deep stages run on fuller batches.
    Where `chunks` raises, the results of all chunks before come first. Closing the iterator drops what is under way.
    """
    work = _Chunks(iter(chunks))
    waiting = [[_Waiting() for _ in range(device.stages)] for _ in range(queues)]
    turns = deque(_queue(device, i, waiting[i], work, policy) for i in range(queues))
    finished = False
    try:
        while turns:
            queue = turns.popleft()
            if next(queue, None) is not None:
                turns.append(queue)
            unfinished = min((w.oldest for stages in waiting for w in stages if w.oldest is not None), default=None)
            while work.taken < (work.begun if unfinished is None else unfinished):
                number, work.taken = work.taken, work.taken + 1
                yield device.take(number % SLOTS, work.sizes[number])
        finished = True
    finally:
        if not finished:
            device.clear()
    if work.failed:
        raise work.failed.pop()  # kept nowhere: its traceback knows this frame


def _queue(
    device: Device, queue: int, waiting: list[_Waiting], work: _Chunks, policy: Policy
) -> Iterator[bool]:  # yields whenever others may queue work
    last = device.stages - 1
    while work.peek() is not None or any(w.most for w in waiting):
        stage = _next_stage(device, waiting, work)
        if stage is None:
            yield True
            continue
        if stage == 0:
            number, chunk = work.pop()
            if len(chunk) == 0:
                continue
            device.put(queue, chunk, number % SLOTS)
            waiting[0].add(len(chunk), len(chunk), number)
        here, waiting[stage] = waiting[stage], _Waiting()
        assert here.oldest is not None
        device.launch(queue, stage, here.most, here.expected)
        reads = False
        if stage < last:
            reads, survivors = policy(stage, here.most, here.expected)
            waiting[stage + 1].add(here.most, survivors, here.oldest)
        yield True
        if reads:
            there = waiting[stage + 1]
            there.most = device.count(queue, stage + 1)
            there.expected = there.most
            there.oldest = there.oldest if there.most else None


def _next_stage(device: Device, waiting: list[_Waiting], work: _Chunks) -> int | None:
    """The stage that runs next, the first on a new chunk; None where there is nothing to do until others are done."""
    overdue = [i for i, w in enumerate(waiting) if w.oldest is not None and work.begun - w.oldest > DELAY]
    chunk = None if work.full else work.peek()
    if not overdue and chunk is not None:
        return _first_in_the_way(device, waiting, 1, len(chunk)) or 0
    # The shallowest first, so that its survivors meet those that wait.
    wanted = overdue[-1] if overdue else next((i for i, w in enumerate(waiting) if w.most), None)
    return wanted and (_first_in_the_way(device, waiting, wanted + 1, waiting[wanted].most) or wanted)


def _first_in_the_way(device: Device, waiting: list[_Waiting], stage: int, rows: int) -> int | None:
    """The stage that must run first so that `rows` more can wait before `stage`; None where they fit."""
    if stage == device.stages or waiting[stage].most + rows <= device.capacity:
        return None
    return _first_in_the_way(device, waiting, stage + 1, waiting[stage].most) or stage
