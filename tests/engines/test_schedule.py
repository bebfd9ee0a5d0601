"""The order of the compact engine's work on a device of plain Python lists: every row answered once, in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from eefast.engines.schedule import DELAY, SLOTS, answers
from eefast.result import ExitResult


class Lists:
    """A row is its image; the number in it is the exit that it takes. Checks what a real device could not survive."""

    def __init__(self, stages: int, capacity: int, queues: int) -> None:
        self.stages, self.capacity = stages, capacity
        self.waiting: list[list[list[tuple[int, int]]]] = [[[] for _ in range(stages)] for _ in range(queues)]
        self.results = [-1] * (SLOTS * capacity)
        self.launches: list[tuple[int, int, int, int]] = []
        self.in_use: dict[int, int] = {}

    def put(self, queue: int, images: Tensor, slot: int) -> None:
        assert slot not in self.in_use, "answers of another chunk are still there"
        self.in_use[slot] = len(images)
        first = slot * self.capacity
        self.results[first : first + self.capacity] = [-1] * self.capacity
        assert not self.waiting[queue][0]
        self.waiting[queue][0] = [(int(e), first + i) for i, e in enumerate(images.view(-1).tolist())]

    def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
        here, self.waiting[queue][stage] = self.waiting[queue][stage], []
        assert len(here) <= rows <= self.capacity, "rows would be lost"
        self.launches.append((queue, stage, rows, len(here)))
        for leaves_at, position in here:
            if leaves_at <= stage or stage == self.stages - 1:
                assert self.results[position] == -1, "answered twice"
                self.results[position] = stage
            else:
                self.waiting[queue][stage + 1].append((leaves_at, position))
        if stage + 1 < self.stages:
            assert len(self.waiting[queue][stage + 1]) <= self.capacity, "survivors do not fit"

    def count(self, queue: int, stage: int) -> int:
        assert self.launches[-1][:1] == (queue,) or len(self.waiting) > 1
        return len(self.waiting[queue][stage])

    def take(self, slot: int, size: int) -> ExitResult:
        self.in_use.pop(slot, None)
        exits = torch.tensor(self.results[slot * self.capacity :][:size], dtype=torch.int64)
        return ExitResult(exits, exits, exits, exits)

    def clear(self) -> None:
        self.waiting = [[[] for _ in range(self.stages)] for _ in self.waiting]


def chunk(rng: random.Random, n: int, stages: int) -> Tensor:
    return torch.tensor([min(rng.choice([0, 0, 1, rng.randrange(stages)]), stages - 1) for _ in range(n)]).view(
        -1, 1, 1, 1
    )


def policies(rng: random.Random) -> dict[str, Callable[[int, int, float], tuple[bool, float]]]:
    return {
        "always": lambda stage, most, expected: (True, expected / 2),
        "never": lambda stage, most, expected: (False, expected / 2),
        "sometimes": lambda stage, most, expected: (rng.random() < 0.5, expected / 2),
    }


@pytest.mark.parametrize("policy", ["always", "never", "sometimes"])
@pytest.mark.parametrize("queues", [1, 2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3, 9])
@pytest.mark.sampled(12)
def test_every_row_is_answered_once_in_order(stages: int, queues: int, policy: str) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        capacity = rng.choice([1, 3, 8, 31])
        device = Lists(stages, capacity, queues)
        chunks = [chunk(rng, rng.randrange(capacity + 1), stages) for _ in range(rng.choice([0, 1, 2, 5, 40]))]
        got = list(answers(device, iter(chunks), policies(rng)[policy], queues))
        assert [r.exit_index.tolist() for r in got] == [c.view(-1).tolist() for c in chunks]
        assert not any(any(queue) for queue in device.waiting)


def test_survivors_of_several_chunks_run_together() -> None:
    device = Lists(2, 8, 1)
    chunks = [torch.tensor([0, 0, 0, 1]).view(-1, 1, 1, 1) for _ in range(8)]
    list(answers(device, chunks, policies(random.Random(0))["always"]))
    assert [rows for _, stage, _, rows in device.launches if stage == 0] == [4] * 8
    assert [rows for _, stage, _, rows in device.launches if stage == 1] == [5, 3]


def test_no_sample_waits_longer_than_the_delay() -> None:
    """One survivor in the first chunk, none later: it must not wait for others that never come."""
    first = torch.tensor([2, 0, 0]).view(-1, 1, 1, 1)
    begun = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal begun
        for i in range(100):
            begun = i + 1
            yield first if i == 0 else torch.zeros(3, 1, 1, 1)

    results = answers(Lists(3, 1000, 1), chunks(), policies(random.Random(0))["always"])
    assert next(results).exit_index.tolist() == [2, 0, 0]
    assert begun <= DELAY + 3


def test_queues_take_turns_so_that_work_follows_every_wait() -> None:
    order: list[tuple[str, int]] = []

    class Watched(Lists):
        def launch(self, queue: int, stage: int, rows: int, expected: float) -> None:
            order.append(("launch", queue))
            super().launch(queue, stage, rows, expected)

        def count(self, queue: int, stage: int) -> int:
            order.append(("count", queue))
            return super().count(queue, stage)

    chunks = [torch.full((4, 1, 1, 1), 3) for _ in range(2)]
    list(answers(Watched(4, 4, 2), chunks, policies(random.Random(0))["always"], queues=2))
    for i, (what, queue) in enumerate(order):
        if what == "count":
            queued_since = [other for w, other in order[:i] if w == "launch"][-1]
            assert queued_since != queue, "the device has nothing to do while the host waits"


def test_what_the_source_raises_comes_after_the_results_before_it() -> None:
    def chunks() -> Iterator[Tensor]:
        for e in (2, 0, 1):
            yield torch.full((3, 1, 1, 1), e)
        raise OSError("the disk is gone")

    results = answers(Lists(3, 8, 2), chunks(), policies(random.Random(0))["always"], queues=2)
    assert [next(results).exit_index.tolist() for _ in range(3)] == [[2] * 3, [0] * 3, [1] * 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)


def test_closing_drops_what_is_under_way_and_leaves_the_device_empty() -> None:
    device = Lists(3, 8, 2)
    results = answers(
        device, (torch.full((4, 1, 1, 1), 2) for _ in range(1000)), policies(random.Random(0))["always"], 2
    )
    next(results)
    results.close()
    assert not any(any(queue) for queue in device.waiting)


def test_an_endless_stream_keeps_few_chunks() -> None:
    rng = random.Random(0)
    read = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal read
        while True:
            read += 1
            yield chunk(rng, 8, 9)

    results = answers(Lists(9, 16, 2), chunks(), policies(rng)["sometimes"], queues=2)
    for taken in range(300):
        next(results)
        assert read - taken <= SLOTS + 1
