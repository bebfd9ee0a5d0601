"""Seconds that work has taken → the seconds that the same work will hardly exceed."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from math import ceil
from threading import Lock

RECENT, SHARE = 32, 0.9
"""How many observations count, and the share of them that took no longer than `usual`."""


class Usual:
    """`value`: the 90 % quantile of the last 32 observations, that of the first one until there are more.

    Any number of threads may add observations and read the value.
    """

    def __init__(self, first: float) -> None:
        self._recent, self._ordered, self.value = deque([first], RECENT), [first], first
        self._adding = Lock()

    def add(self, seconds: float) -> None:
        with self._adding:
            if len(self._recent) == RECENT:
                del self._ordered[bisect_left(self._ordered, self._recent[0])]
            self._recent.append(seconds)
            insort(self._ordered, seconds)
            self.value = self._ordered[ceil(SHARE * (len(self._ordered) - 1))]


class CallDurations:
    """Of calls on single images: seconds to every exit, measured once, times how much longer recent calls took."""

    def __init__(self, seconds: list[float]) -> None:
        """seconds: one per exit, 0 … n."""
        self.seconds, self._factor = seconds, Usual(1.0)

    def add(self, exit_index: int, seconds: float) -> None:
        self._factor.add(seconds / self.seconds[exit_index])

    def to(self, exit_index: int) -> float:
        return self.seconds[exit_index] * self._factor.value

    def last_exit(self, seconds: float) -> int:
        """The last exit that is reached within this time, 0 where none is."""
        return max((i for i in range(len(self.seconds)) if self.to(i) <= seconds), default=0)
