"""A folder of image files → shards of their paths, listed once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..data.image_files import image_paths
from .chunks import Chunk, Shard, cut


class ImageFolder:
    """The image files in a folder and below it; their ids are their paths from there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def describe(self) -> dict[str, Any]:
        return {"kind": "folder"}

    def plan(self, shard_size: int, listing: BinaryIO) -> list[Shard]:
        """A line per image, with size and time of its last change."""
        names = sorted(os.path.relpath(path, self.root) for path in image_paths(self.root))
        shards = list[Shard]()
        for start, count in cut(len(names), shard_size):
            shards.append(Shard(len(shards), count, (listing.tell(),)))
            for name in names[start : start + count]:
                found = (self.root / name).stat()
                listing.write(json.dumps([name, found.st_size, found.st_mtime_ns]).encode() + b"\n")
        return shards

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        with listing.open("rb") as lines:
            lines.seek(shard.place[0])
            rest = islice(lines, shard.count)
            while names := [json.loads(line)[0] for line in islice(rest, size)]:
                yield Chunk([printable(Path(name).as_posix()) for name in names], [self.root / name for name in names])


def printable(name: str) -> str:
    """A name as UTF-8 holds it: bytes of file names that are not UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
