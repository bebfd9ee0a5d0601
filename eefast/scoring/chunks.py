"""Shards of an input, and the pieces in which a shard is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

Content = Path | bytes | np.ndarray[Any, Any] | str
"""An image: its file, the content of one, its pixels [C, H, W] uint8, or why there is none."""


@dataclass(frozen=True)
class Shard:
    """Images that are answered together and written to one file.

    number: 0 …; count: of images; place: where they are, numbers that the source understands.
    """

    number: int
    count: int
    place: tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """Successive images of a shard.

    ids: unique in the whole input.
    images: one `Content` for each; or pixels of all [n, C, H, W], as the network takes them.
    """

    ids: Sequence[str]
    images: Sequence[Content] | np.ndarray[Any, Any]


class Source(Protocol):
    """An input, pickled to be sent to the workers; `plan` has been called before."""

    def plan(self, shard_size: int, listing: BinaryIO) -> list[Shard]:
        """List all images once: their shards, and what workers need to find them, written to `listing`.

        Raises `ValueError` for two images with the same id.
        """

    def describe(self) -> dict[str, Any]:
        """What the answers depend on, besides the listing, as JSON takes it."""

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        """The images of a shard in their order, at most `size` in a chunk; listing: the file that `plan` wrote."""


def cut(count: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, number) of successive ranges of at most `size`."""
    for start in range(0, count, size):
        yield start, min(size, count - start)
