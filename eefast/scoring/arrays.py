"""Files of pixels or windows, .npy or idx → shards of rows, read without mapping them into memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .chunks import Chunk, Shard, cut


@dataclass(frozen=True)
class _Table:
    """A file with values [N, …] from byte `start` on."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    start: int

    def read(self, first: int, count: int) -> np.ndarray[Any, Any]:
        of_one = int(np.prod(self.shape[1:], dtype=np.int64))
        offset = self.start + first * of_one * self.dtype.itemsize
        found = np.fromfile(self.path, self.dtype, count * of_one, offset=offset)
        if len(found) != count * of_one:
            raise ValueError(f"{self.path} is shorter than its header says; make it again")
        return found.reshape(count, *self.shape[1:])


class Arrays:
    """Images that are decoded already, [N, C, H, W], [N, H, W, C] or [N, H, W], as the network takes them.

    A network on rows takes windows instead, [N, C, L], [N, L, C] or [N, L].
    Their ids are row numbers, after the file's name and a colon where there are several files.
    shape: (C, H, W) or (C, L) of the network.
    Raises `ValueError` for other shapes and dtypes.
    """

    def __init__(self, paths: Sequence[Path], shape: Sequence[int]) -> None:
        self.tables, self.shape = [_table(path) for path in paths], tuple(shape)
        for table in self.tables:
            self._axes(table)

    def describe(self) -> dict[str, Any]:
        return {"kind": "array"}

    def plan(self, shard_size: int, listing: BinaryIO) -> list[Shard]:
        shards = list[Shard]()
        for number, table in enumerate(self.tables):
            found = table.path.stat()
            line = [table.path.name, found.st_size, found.st_mtime_ns]
            listing.write(json.dumps(line).encode() + b"\n")
            for start, count in cut(table.shape[0], shard_size):
                shards.append(Shard(len(shards), count, (number, start)))
        names = [table.path.name for table in self.tables]
        if len({*names}) < len(names):
            raise ValueError(
                f"two of the files are called {max(names, key=names.count)}, so ids would repeat; rename one"
            )
        return shards

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        number, first = shard.place
        table, prefix = self.tables[number], ""
        if len(self.tables) > 1:
            prefix = f"{table.path.name}:"
        for start, count in cut(shard.count, size):
            ids = [f"{prefix}{row}" for row in range(first + start, first + start + count)]
            yield Chunk(ids, self._read(table, first + start, count))

    def all(self) -> Iterator[np.ndarray[Any, Any]]:
        """Each image, [C, H, W] or [C, L]."""
        for table in self.tables:
            yield from self._read(table, 0, table.shape[0])

    def _read(self, table: _Table, first: int, count: int) -> np.ndarray[Any, Any]:
        """[count, C, H, W] or [count, C, L]."""
        values, axes = table.read(first, count), self._axes(table)
        return values[:, None] if axes is None else np.ascontiguousarray(values.transpose(axes))

    def _axes(self, table: _Table) -> tuple[int, ...] | None:
        """How dimensions are reordered to [N, C, …]; None where C is missing."""
        channels, sides, shape = self.shape[0], len(self.shape) - 1, table.shape
        if table.dtype != np.uint8 and table.dtype.kind != "f":
            raise ValueError(f"{table.path} holds {table.dtype}; save pixels as uint8, or normalised floats")
        if len(shape) == sides + 1 and channels == 1:
            return None
        if len(shape) == sides + 2 and shape[1] == channels:
            return tuple(range(len(shape)))
        if len(shape) == sides + 2 and shape[-1] == channels:
            return 0, sides + 1, *range(1, sides + 1)
        raise ValueError(
            f"{table.path} has shape {shape}; the network takes {channels} channels: "
            f"save [N, {channels}, {'L' if sides == 1 else 'H, W'}]"
        )


def _table(path: Path) -> _Table:
    with path.open("rb") as file:
        start = file.read(4)
        if start[:3] == b"\0\0\x08":  # idx, see `eefast.data.mnist.read_idx`
            sizes = np.frombuffer(file.read(4 * start[3]), ">u4").tolist()
            return _Table(path, tuple(sizes), np.dtype(np.uint8), 4 + 4 * start[3])
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_columns, dtype = read(file)
        except ValueError as error:
            raise ValueError(f"{path} is no .npy or idx file ({error}); write it with numpy.save") from error
        if by_columns and len(shape) > 1:
            raise ValueError(f"{path} is stored column by column; save numpy.ascontiguousarray of it")
        return _Table(path, shape, dtype, file.tell())
