"""Tar files in the layout of webdataset → shards of the images in them, found once, read by their offsets."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..data.image_files import IMAGE_SUFFIXES
from .chunks import Chunk, Shard
from .image_folder import printable
from .unique_ids import UniqueIds


class ImageTars:
    """The images in tar files; their ids are webdataset's keys: a member's name up to the first dot.

    ending: of the members that are images, without its dot; None for all image formats.
    """

    def __init__(self, paths: Sequence[Path], ending: str | None) -> None:
        self.paths, self.ending = list(paths), ending

    def describe(self) -> dict[str, Any]:
        return {"kind": "tar", "ending": self.ending, "files": [path.name for path in self.paths]}

    def plan(self, shard_size: int, listing: BinaryIO) -> list[Shard]:
        """A line per image with its tar file, offset and size. A shard may reach over several tar files."""
        shards, unique, start, count = list[Shard](), UniqueIds(), 0, 0
        for number, path in enumerate(self.paths):
            changed = path.stat().st_mtime_ns
            for member in self._members(path):
                if count == shard_size:
                    shards.append(Shard(len(shards), count, (start,)))
                    start, count = listing.tell(), 0
                key = _key(member.name)
                unique.add(key)
                line = [key, number, member.offset_data, member.size, changed]
                listing.write(json.dumps(line).encode() + b"\n")
                count += 1
        if count:
            shards.append(Shard(len(shards), count, (start,)))
        unique.check(
            lambda: (_key(member.name) for path in self.paths for member in self._members(path)),
            "rename one, name the image among several files of a key by --image-column jpg, or score the tar files "
            "that repeat keys one by one",
        )
        return shards

    def _members(self, path: Path) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    suffix = Path(member.name).suffix.lower()
                    wanted = suffix == f".{self.ending}" if self.ending else suffix in IMAGE_SUFFIXES
                    if wanted and (member.islnk() or member.issym()):
                        raise ValueError(
                            f"{path}: {member.name} is a link to {member.linkname}; make the tar file with "
                            "--dereference --hard-dereference, or leave links out"
                        )
                    if wanted and member.isfile():
                        yield member
                    archive.members = []  # type: ignore[attr-defined]  # which it would keep all of
                _check_end(path, archive.offset)
        except tarfile.TarError as error:
            raise ValueError(
                f"{path} is no whole, uncompressed tar file ({error}); make it again, or leave it out"
            ) from error

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        with listing.open("rb") as lines:
            lines.seek(shard.place[0])
            rest, opened, file = islice(lines, shard.count), -1, None
            try:
                while rows := [json.loads(line) for line in islice(rest, size)]:
                    images = []
                    for _, number, offset, length, _ in rows:
                        if file is None or number != opened:
                            if file is not None:
                                file.close()
                            opened, file = number, self.paths[number].open("rb")
                        file.seek(offset)
                        images.append(file.read(length))
                    yield Chunk([printable(row[0]) for row in rows], images)
            finally:
                if file is not None:
                    file.close()


def _check_end(path: Path, offset: int) -> None:
    """`TarError` unless only zeros follow, a block at least: tarfile ends without a word at headers it cannot read."""
    with path.open("rb") as file:
        file.seek(offset)
        rest = file.read(1 << 20)
        ended = len(rest) >= tarfile.BLOCKSIZE
        while ended and rest:
            ended, rest = not rest.strip(b"\0"), file.read(1 << 20)
    if not ended:
        raise tarfile.ReadError(f"no end of the archive at byte {offset}, where its members end")


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]
