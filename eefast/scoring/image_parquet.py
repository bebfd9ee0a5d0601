"""Parquet files with a column of images → shards of rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .chunks import Chunk, Content, Shard, cut
from .unique_ids import UniqueIds

ID_COLUMN = "id"
ROWS = 4096
"""Rows of ids that are read at once."""


class ImageParquet:
    """The images in a column of parquet files: contents of image files, also as {"bytes": …}, or lists of pixels.

    image_column, id_column: their names; without a column of ids these are the file's name, a colon, the row's number.
    shape: (C, H, W) of the network, for lists of pixels in this order.
    Raises `ValueError` for unknown columns and columns of other types.
    """

    def __init__(self, paths: Sequence[Path], image_column: str, id_column: str | None, shape: Sequence[int]) -> None:
        self.paths, self.image_column, self.shape = list(paths), image_column, tuple(shape)
        names = self._opened(0).schema_arrow.names
        self.id_column = id_column if id_column is not None or ID_COLUMN not in names else ID_COLUMN
        for number in range(len(self.paths)):
            self._check(number)

    def describe(self) -> dict[str, Any]:
        return {"kind": "parquet", "image_column": self.image_column, "id_column": self.id_column}

    def plan(self, shard_size: int, listing: BinaryIO) -> list[Shard]:
        shards, unique = list[Shard](), UniqueIds()
        for number, path in enumerate(self.paths):
            found = path.stat()
            listing.write(json.dumps([path.name, found.st_size, found.st_mtime_ns]).encode() + b"\n")
            with self._opened(number) as file:
                for start, count in cut(file.metadata.num_rows, shard_size):
                    shards.append(Shard(len(shards), count, (number, start)))
            for name in self._ids(number):
                unique.add(name)
        unique.check(
            lambda: (name for number in range(len(self.paths)) for name in self._ids(number)),
            "name a column with different values by --id-column"
            if self.id_column is not None
            else "rename one of the files",
        )
        return shards

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        number, first = shard.place
        columns = [self.image_column, *([self.id_column] if self.id_column is not None else [])]
        with self._opened(number) as file:
            groups, row = list[int](), 0  # those that hold the shard's rows, and the first row of the first one
            begin = 0
            for i in range(file.metadata.num_row_groups):
                end = begin + file.metadata.row_group(i).num_rows
                if begin < first + shard.count and end > first:
                    row = row if groups else begin
                    groups.append(i)
                begin = end
            for batch in file.iter_batches(size, groups, columns):
                low, high = max(first - row, 0), min(first + shard.count - row, len(batch))
                if low < high:
                    part = batch.slice(low, high - low)
                    names = self._names(part, number, row + low)
                    yield Chunk(names, self._images(part.column(0)))
                row += len(batch)

    def _opened(self, number: int) -> Any:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self.paths[number])
        except ArrowException as error:
            raise ValueError(f"{self.paths[number]} is no whole parquet file ({error}); write it again") from error

    def _check(self, number: int) -> None:
        import pyarrow as pa

        with self._opened(number) as file:
            schema = file.schema_arrow
        path, options = self.paths[number], {"image-column": self.image_column, "id-column": self.id_column}
        for option, name in options.items():
            if name is not None and name not in schema.names:
                raise ValueError(f"{path} has no column {name!r}; name one of {', '.join(schema.names)} by --{option}")
        kind = schema.field(self.image_column).type
        if pa.types.is_struct(kind) and "bytes" in [field.name for field in kind]:
            kind = kind.field("bytes").type
        pixels = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (
            pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or (pixels and kind.value_type == pa.uint8())
        ):
            raise ValueError(
                f"the column {self.image_column!r} of {path} holds {kind}; give the contents of image files (binary), "
                "or pixels (lists of uint8)"
            )
        if pa.types.is_fixed_size_list(kind) and kind.list_size != prod(self.shape):
            raise ValueError(
                f"the column {self.image_column!r} of {path} holds {kind.list_size} pixels an image; the network takes "
                f"{' × '.join(map(str, self.shape))}"
            )
        if self.id_column is not None:
            kind = schema.field(self.id_column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
                raise ValueError(f"the column {self.id_column!r} of {path} holds {kind}; ids are texts or integers")

    def _ids(self, number: int) -> Iterator[str]:
        with self._opened(number) as file:
            if self.id_column is None:
                yield f"{self.paths[number].name}:"  # which all ids of this file begin with
                return
            for batch in file.iter_batches(ROWS, columns=[self.id_column]):
                for name in batch.column(0).to_pylist():
                    if name is None:
                        raise ValueError(
                            f"the column {self.id_column!r} of {self.paths[number]} has rows without an id"
                        )
                    yield str(name)

    def _names(self, batch: Any, number: int, first: int) -> list[str]:
        if self.id_column is None:
            return [f"{self.paths[number].name}:{row}" for row in range(first, first + len(batch))]
        return [str(name) for name in batch.column(1).to_pylist()]

    def _images(self, column: Any) -> list[Content]:
        import pyarrow as pa

        if pa.types.is_struct(column.type):
            column = column.field("bytes")
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            return [value if value is not None else "there is no image in this row" for value in column.to_pylist()]
        return [self._pixels(value) for value in column]

    def _pixels(self, value: Any) -> Content:
        if not value.is_valid:
            return "there is no image in this row"
        found = value.values.to_numpy(zero_copy_only=False)
        if found.dtype != np.uint8 or len(found) != prod(self.shape):
            return f"{len(found)} pixels, or some missing; the network takes {' × '.join(map(str, self.shape))}"
        return found.reshape(self.shape)
