"""Shards that are done, images answered so far → how far a run is, and what it has done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .chunks import Shard
from .part_files import Totals
from .pipeline import Answered


@dataclass(frozen=True)
class Scored:
    """What a run did; `summary.json` in its folder holds the same.

    images: of all shards of this share; failed: of these, images that could not be read; skipped: images whose rows
        were there already. mean_cost, exits: over the others, exits as numbers of images.
    shards, skipped_shards: how many; seconds: of this run, of which setup_seconds passed before the first worker was
        ready.
    """

    images: int
    failed: int
    skipped: int
    mean_cost: float | None
    exits: tuple[int, ...]
    shards: int
    skipped_shards: int
    seconds: float
    setup_seconds: float


@dataclass(frozen=True)
class Standing:
    """How far a run is. images: done of total, those of earlier runs included; left: seconds, None where unknown."""

    images: int
    total: int
    failed: int
    images_per_s: float
    mean_cost: float | None
    left: float | None


class Tally:
    """Adds up what is done, and reports it; is what `processes.Watcher` says.

    shards: of this run's share; there: totals of those whose rows were there before, by number.
    progress: gets a `Standing` at every tick.
    """

    def __init__(
        self, shards: Sequence[Shard], there: dict[int, Totals], progress: Callable[[Standing], None] | None
    ) -> None:
        self.shards, self.there, self.progress = shards, there, progress
        self.totals = list(there.values())
        self.begin: float | None = None
        self.skipped = sum(totals.images for totals in self.totals)
        self.total = sum(shard.count for shard in shards)

    def ready(self) -> None:
        self.begin = self.begin or time.monotonic()

    def done(self, shard: Shard, totals: Totals) -> None:
        self.totals.append(totals)

    def tick(self, more: Sequence[Answered]) -> None:
        if self.progress is None:
            return
        answered = sum(t.images - t.failed for t in self.totals) + sum(a.images for a in more)
        failed = sum(t.failed for t in self.totals) + sum(a.failed for a in more)
        cost = sum(t.cost for t in self.totals) + sum(a.cost for a in more)
        images, seconds = answered + failed, time.monotonic() - (self.begin or time.monotonic())
        rate = (images - self.skipped) / seconds if seconds > 0 else 0.0
        left = (self.total - images) / rate if rate > 0 else None
        self.progress(Standing(images, self.total, failed, rate, cost / answered if answered else None, left))

    def result(self, start: float) -> Scored:
        """start: of the whole run, by the monotonic clock."""
        seconds, setup = time.monotonic() - start, (self.begin or time.monotonic()) - start
        failed = sum(totals.failed for totals in self.totals)
        answered = sum(totals.images for totals in self.totals) - failed
        cost = sum(totals.cost for totals in self.totals) / answered if answered else None
        exits = tuple(map(sum, zip(*(totals.exits for totals in self.totals), strict=True)))
        return Scored(
            answered + failed, failed, self.skipped, cost, exits, len(self.shards), len(self.there), seconds, setup
        )
