"""Steps of work → how many are done, reported after each; of work that may be short only when it was not."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TextIO, TypeVar

Item = TypeVar("Item")
# Called with (description of the work, steps done, steps in all).
Progress = Callable[[str, int, int], None]


def reported(items: Collection[Item], what: str, progress: Progress) -> Iterator[Item]:
    """The items, of which each is one step; see `counted`."""
    return counted(items, what, progress, len(items), lambda item: 1)


def counted(
    items: Iterable[Item], what: str, progress: Progress, total: int, size: Callable[[Item], int]
) -> Iterator[Item]:
    """The items; before the first and after each one `progress` is called with (what, steps done, total).

    size: item → number of its steps; total: their sum over all items.
    """
    done = 0
    progress(what, done, total)
    for item in items:
        yield item
        done += size(item)
        progress(what, done, total)


LATE = 2.0
"""Seconds after which work of unknown length says how far it is."""


class Late:
    """A `Progress` of one line on a terminal, from `LATE` seconds on; it says nothing elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """stream: by default stderr."""
        self._stream = sys.stderr if stream is None else stream
        self._begin, self._said = time.monotonic(), 0

    def __call__(self, what: str, done: int, total: int) -> None:
        passed = time.monotonic() - self._begin
        if passed > LATE and self._stream is not None and self._stream.isatty():
            self._write(f"eefast: {what}, {done} of {total}, {passed:.0f} s")

    def close(self) -> None:
        """Remove the line."""
        if self._said:
            self._write("")

    def _write(self, line: str) -> None:
        self._stream.write(f"\r{line.ljust(self._said)}" if line else f"\r{' ' * self._said}\r")
        self._stream.flush()
        self._said = len(line)
