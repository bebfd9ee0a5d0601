"""Host time per batch: both sides take turns, launches are shared and counted, every answer is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import host_time
import pytest


@pytest.mark.parametrize(("size", "launches"), [(256, 2), (2048, 9), (3, 2)])
def test_small_batches_share_launches(size: int, launches: int) -> None:
    run = host_time.stream_of("eenet20", size, 9)
    host_time.Nothing.calls = 0
    assert run() == 9 * size
    assert host_time.Nothing.calls == 3 + 7 * launches  # streams; then events, a memset and a kernel


class Side:
    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, list[Any]()

    def turn(self, case: Any) -> tuple[float, float]:
        order.append(self.folder.name)
        self.asked.append(case)
        return (10.0 if self.folder.name == "before" else 4.0) + len(self.asked), 3.0

    def close(self) -> None:
        order.append("closed")


order: list[str] = []


def test_rows_tell_both_sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order.clear()
    monkeypatch.setattr(host_time, "Side", Side)
    monkeypatch.setattr(host_time, "CASES", ((7, "eenet20"),))
    (row,) = host_time.rows(tmp_path / "before", 9)
    assert row.microseconds == 6
    assert row.base_microseconds == 12
    assert row.ratio == 2
    assert (row.host_time, row.batch_size, row.turns, row.base) == ("eenet20", 7, 9, "")
    assert order[-2:] == ["closed", "closed"]
    assert [name == "before" for name in order[:4]] == [True, False, False, True]
