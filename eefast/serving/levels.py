"""The share of the queue that is full → the profile that images are answered by, a cheaper one under load."""

from __future__ import annotations

from collections.abc import Sequence

BACK, FIRST, LAST = 0.2, 0.5, 0.9
"""Shares of the queue: below which the first level is taken again, at which the second one begins, and the last."""


class Levels:
    """names: of profiles, from the dearest to the cheapest; without any, images are answered by the thresholds."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names, self._now = tuple(names), 0
        cheaper = len(self.names) - 1
        self._begins = [FIRST + (LAST - FIRST) * i / max(cheaper - 1, 1) for i in range(cheaper)]

    def at(self, share: float) -> str | None:
        """The level for a request that comes while this share of the queue is full, 0 … 1.

        Where it falls below a half, the level stays until it falls below a fifth, so that levels do not alternate.
        """
        if share < BACK:
            self._now = 0
        self._now = max(self._now, sum(share >= begin for begin in self._begins))
        return self.names[self._now] if self.names else None

    @property
    def number(self) -> int:
        """0 for the first level, that of no load."""
        return self._now
