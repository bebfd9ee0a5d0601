"""Choose where the host waits for a count: seconds of every stage at every batch size → a decision at each exit."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import ceil, sqrt
from operator import mul

STEP = 1.25
"""Ratio of neighbouring batch sizes; rows that only fill up the batch cost 12 % on average."""


NEAR = 1.03
"""A batch size that is this much larger at most serves as well."""


def sizes(largest: int, step: float = STEP, more: Iterable[int] = ()) -> tuple[int, ...]:
    """Batch sizes up to `largest` for which graphs are captured, ascending, each about `step` times the one before.

    more: sizes that are often needed; those that no other one is near to are added.
    """
    found = [largest]
    while found[-1] > 1:
        found.append(min(found[-1] - 1, round(found[-1] / step)))
    for rows in more:
        if not any(rows <= size <= NEAR * rows for size in found):
            found.append(rows)
    return tuple(sorted(found))


def arriving(rows: int, survivors: Sequence[float]) -> list[int]:
    """Rows of a batch that come to each stage, two standard deviations above what is expected.

    survivors: share of the arriving rows that go on, per early exit.
    """
    shares = accumulate(survivors, mul, initial=1.0)
    return [min(rows, max(1, ceil(rows * s + 2 * sqrt(rows * s * (1 - s))))) for s in shares]


@dataclass(frozen=True)
class Counted:
    """Seconds of a stage that reads the number of its rows on the device: fixed, and more for each live row."""

    fixed: float
    row: float


@dataclass(frozen=True)
class Times:
    """What a device takes.

    sizes: batch sizes with a graph, ascending.
    stages: [stage][size] seconds of a stage with its exit and the gather of its survivors.
    counted: per stage, the same in its device-counted form; None where it has none.
    wait: seconds from the end of a stage until work begins that the host queues upon reading its count.
    launch: seconds of the host to queue a stage.
    survivors: share of the arriving rows that go on, per early exit.
    """

    sizes: tuple[int, ...]
    stages: tuple[tuple[float, ...], ...]
    counted: tuple[Counted | None, ...]
    wait: float
    launch: float
    survivors: tuple[float, ...]


class HostReadPolicy:
    """At which exits the host reads a count so that a batch takes least, by the times of a device.

    At each exit the host can wait for the number of survivors, so that the next stage runs at the next larger size that
    has a graph; or go on without knowing, with dead rows carried along, or with a stage that counts its rows itself.

    queues: batches under way at a time. With several a wait only shows as far as the others' work does not cover it.
    """

    def __init__(self, times: Times, queues: int = 1) -> None:
        self.times, self.queues = times, queues
        self._rest = lru_cache(maxsize=4096)(self._seconds_from)

    def bucket(self, rows: int) -> int:
        """Index of the smallest size that holds `rows`."""
        return bisect_left(self.times.sizes, rows)

    def counted(self, stage: int, most: int, expected: float) -> bool:
        """Whether a stage runs in its device-counted form, on `expected` rows of which the host only knows `most`."""
        form = self.times.counted[stage]
        return form is not None and form.fixed + form.row * expected < self.times.stages[stage][self.bucket(most)]

    def __call__(self, stage: int, most: int, expected: float) -> tuple[bool, float]:
        """Whether the host reads the count after an early exit, and how many survivors it expects."""
        reading, carrying = self._choices(stage, most, expected, 1.0)
        return reading < carrying, expected * self.times.survivors[stage]

    def seconds(self, rows: int) -> float:
        """What a batch takes, all queues' batches being of this size."""
        return self._rest(0, rows, float(rows), 1.0)

    def path(self, rows: int) -> list[str]:
        """What happens at each exit of a batch where as many survive as expected."""
        most, expected, found = rows, float(rows), []
        last = len(self.times.stages) - 1
        for stage in range(last):
            reads, survivors = self(stage, most, expected)
            most = max(1, ceil(survivors)) if reads else most
            expected = survivors
            unread = "the next stage counts" if self.counted(stage + 1, most, expected) else "carried along"
            found.append("the host reads the count" if reads else unread)
        return [*found, "the end"]

    def _seconds_from(self, stage: int, most: int, expected: float, others: float) -> float:
        """others: probability that the other queues still have work."""
        here = self._of_stage(stage, most, expected)
        if stage == len(self.times.stages) - 1:
            return here
        return here + min(self._choices(stage, most, expected, others))

    def _of_stage(self, stage: int, most: int, expected: float) -> float:
        form = self.times.counted[stage]
        if form is not None and self.counted(stage, most, expected):
            return max(form.fixed + form.row * expected, self.times.launch)
        return max(self.times.stages[stage][self.bucket(most)], self.times.launch)

    def _choices(self, stage: int, most: int, expected: float, others: float) -> tuple[float, float]:
        """Seconds after an exit: with reading its count, and without."""
        share = self.times.survivors[stage]
        # Where no row survives, and the host knows, nothing more runs.
        some = 1 - (1 - share) ** max(expected, 1)
        survivors = min(expected * share / some, most) if some else 1.0
        known = min(most, max(1, ceil(survivors)))
        reading = some * self._rest(stage + 1, known, survivors, others * some)
        if self.queues == 1:
            reading += self.times.wait
        else:
            # The first queue's wait passes while the others run this stage, the last one's while those run the next.
            covers = others * self._of_stage(stage, most, expected), some * self._of_stage(stage + 1, known, survivors)
            reading += sum(max(0.0, self.times.wait - (self.queues - 1) * seconds) for seconds in covers) / 2
        return reading, self._rest(stage + 1, most, expected * share, others)


def queues_for(rows: int, policies: Sequence[HostReadPolicy]) -> int:
    """Into how many equal parts a batch is best cut, one for each queue; `policies`: for 1, 2, … queues."""
    seconds = [p.queues * p.seconds(ceil(rows / p.queues)) for p in policies if p.queues <= max(rows, 1)]
    return 1 + seconds.index(min(seconds))
