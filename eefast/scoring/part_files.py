"""The rows of a shard ↔ part-00017.parquet, written whole; what it says of itself is read without its rows."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..system import files

KEY = b"eefast"


@dataclass(frozen=True)
class Totals:
    """What the rows of a shard add up to.

    images: rows; failed: of these, images that could not be read; cost: sum over the others; exits: images per exit.
    """

    images: int
    failed: int
    cost: float
    exits: tuple[int, ...]


class Rows:
    """The answers of a shard, filled in batch by batch.

    answered: which rows have an answer; errors: row → why it has none.
    """

    def __init__(self, count: int, exits: int, classes: int | None) -> None:
        """classes: number of logits to keep; None keeps none."""
        self.ids = list[str]()
        self.answered, self.errors = np.zeros(count, bool), dict[int, str]()
        self.label, self.exit = np.zeros(count, np.int32), np.zeros(count, np.int32)
        self.confidence, self.cost = np.zeros(count, np.float32), np.zeros(count, np.float32)
        self.logits = None if classes is None else np.zeros((count, classes), np.float32)
        self.exits = exits

    def totals(self) -> Totals:
        exits = np.bincount(self.exit[self.answered], minlength=self.exits)
        cost = float(self.cost[self.answered].astype(np.float64).sum())
        return Totals(len(self.ids), len(self.errors), cost, tuple(exits.tolist()))


def path_of(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05}.parquet"


def write(folder: Path, number: int, digest: str, rows: Rows) -> Totals:
    """Write a shard's rows; digest: of the manifest that they belong to. Raises `WriteError`."""
    import pyarrow as pa
    from pyarrow import parquet

    totals, missing = rows.totals(), ~rows.answered
    columns: dict[str, Any] = {"id": pa.array(rows.ids, pa.string())}
    for name in ("label", "exit", "confidence", "cost"):
        columns[name] = pa.array(getattr(rows, name), mask=missing)
    if rows.logits is not None:
        flat = pa.array(rows.logits.reshape(-1))
        columns["logits"] = pa.FixedSizeListArray.from_arrays(flat, rows.logits.shape[1], mask=pa.array(missing))
    errors: Sequence[str | None] = [rows.errors.get(i) for i in range(len(rows.ids))] if rows.errors else []
    columns["error"] = pa.array(errors, pa.string()) if errors else pa.nulls(len(rows.ids), pa.string())
    told = json.dumps({"manifest": digest, "shard": number, **asdict(totals)})
    table = pa.table(columns).replace_schema_metadata({KEY: told.encode()})
    with files.replaced(path_of(folder, number)) as file:
        parquet.write_table(table, file, compression="zstd", use_dictionary=False)
    return totals


def read_totals(folder: Path, number: int, digest: str) -> Totals | None:
    """What `write` returned; None unless the file is there, whole, and of this manifest and shard."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        metadata = read_metadata(path_of(folder, number))
        told = json.loads((metadata.metadata or {})[KEY])
        if (told.pop("manifest"), told.pop("shard")) != (digest, number) or told["images"] != metadata.num_rows:
            return None
        return Totals(**{**told, "exits": tuple(told["exits"])})
    except (OSError, ArrowException, KeyError, ValueError, TypeError):
        return None


def remove_partial(folder: Path, numbers: set[int]) -> None:
    """Remove what killed processes left of the files of these shards."""
    for path in folder.glob("part-*.partial"):
        found = re.fullmatch(r"part-(\d+)\.parquet\.[0-9a-f]{8}\.partial", path.name)
        if found and int(found[1]) in numbers:
            path.unlink(missing_ok=True)
