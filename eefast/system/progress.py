"""Items → the same items, with the number of those done reported after each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

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
