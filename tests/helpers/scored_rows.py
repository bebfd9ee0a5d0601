"""Rows that `eefast score` wrote, and those that the network gives in this process, image by image."""

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import eefast
from eefast.scoring.chunks import Chunk, Shard
from eefast.scoring.image_folder import ImageFolder


def rows_of(folder: Path) -> dict[str, dict]:
    """All rows by id, of all parts, none of them twice; no file is half written."""
    from pyarrow.parquet import read_table

    assert not list(folder.glob("*.partial"))
    parts = sorted(folder.glob("part-*.parquet"))
    rows = [row for part in parts for row in read_table(part).to_pylist()]
    found = {row["id"]: row for row in rows}
    assert len(found) == len(rows)
    return found


def assert_answers(folder: Path, net: eefast.EarlyExitNet, pixels: dict[str, np.ndarray]) -> None:
    """The rows are the answers of `eefast.accelerate(net)` for the pixels [C, H, W] by their ids.

    Each process measures its own plan, so sums may be added in another order: the last bits of a confidence may differ.
    """
    found = rows_of(folder)
    assert found.keys() == pixels.keys()
    images = torch.from_numpy(np.stack(list(pixels.values())))
    answer = eefast.accelerate(net)(images)
    for i, name in enumerate(pixels):
        row = found[name]
        assert row["error"] is None
        expected = tuple(value[i].item() for value in (answer.labels, answer.exit_index, answer.cost))
        assert tuple(row[key] for key in ("label", "exit", "cost")) == expected, name
        assert row["confidence"] == pytest.approx(answer.confidence[i].item(), rel=1e-5, abs=1e-6), name
        if "logits" in row:
            assert row["logits"] == pytest.approx(answer.logits[i].tolist(), rel=1e-5, abs=1e-5)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


class Dying(ImageFolder):
    """A folder at whose second shard the worker ends."""

    def chunks(self, shard: Shard, size: int, listing: Path) -> Iterator[Chunk]:
        if shard.number == 1:
            os._exit(7)
        yield from super().chunks(shard, size, listing)


def huge_png(side: int) -> bytes:
    """A black image of one bit per pixel, side × side, in a few kilobytes."""

    def part(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side), 1)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")
