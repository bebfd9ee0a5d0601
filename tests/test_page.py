"""docs/benchmarks.md: made from the committed rows, every number in it is one of theirs, losses are not left out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import page  # noqa: E402

FILES = sorted((ROOT / "bench" / "results").glob("*.jsonl"))


def test_the_committed_page_is_what_the_committed_rows_give() -> None:
    assert (ROOT / "docs" / "benchmarks.md").read_text() == page.page(FILES), "run make report"
    figures = set(re.findall(r"\((benchmarks/[^)]*)\)", (ROOT / "docs" / "benchmarks.md").read_text()))
    assert figures
    assert all((ROOT / "docs" / figure).exists() for figure in figures)


def test_every_speed_stands_in_a_row() -> None:
    rows = [json.loads(line) for file in FILES for line in file.read_text().splitlines()]
    speeds = {f"{r['images_per_s'][1]:,.0f}" for r in rows if r.get("images_per_s")}
    cells = re.findall(r"\| ([\d,]{3,}) \(\d+\.\d\d\)", page.page(FILES))
    assert len(cells) > 50
    assert set(cells) <= speeds


def line_of(tmp_path: Path, **changed: object) -> Path:
    rows = [json.loads(line) for line in FILES[0].read_text().splitlines()]
    row = next(r for r in reversed(rows) if r.get("setting") == "no exits" and r["provider"] == "eefast resident")
    slow = {**row, "images_per_s": [1, 2, 3], "realised_ratio": 0.01, **changed}
    rival = {**row, "provider": "plain, ONNX Runtime", "images_per_s": [100, 200, 300], "realised_ratio": 1.0}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, slow, rival)))
    return file


def test_the_newest_row_counts_and_a_loss_is_told(tmp_path: Path) -> None:
    text = page.page([line_of(tmp_path)])
    assert "| eefast resident | 2 (0.01) |" in text
    assert "eefast resident is slower than another way in 1 of 1 cases:" in text
    assert "plain, ONNX Runtime is 100.00×" in text


def test_what_was_not_timed_is_no_number(tmp_path: Path) -> None:
    text = page.page([line_of(tmp_path, provider="eefast other", images_per_s=None)])
    assert "eefast other" not in text


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = page.draw([line_of(tmp_path)], tmp_path / "figures")
    assert [path.suffix for path in made] == [".png"]
    assert made[0].stat().st_size > 10_000
