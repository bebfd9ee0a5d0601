"""The page of trained networks: whether goals are reached, newest rows, speeds of one comparison."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import training_page


def row_of(**changed: Any) -> dict[str, Any]:
    point = rows.TrainedPoint((0.5,), 0.97, 0.3, 0.96, 0.31, 0.32, (70, 30))
    row = rows.TrainingRow(
        "mnist", "eenet20", "learned", (0.1, 1.0), {"epochs": 3}, {}, (60.0, 50.0), 100, 0.01, 0.4, 0.97, 0.965,
        (0.9, 0.966), point, point, "", ((0.9, 0.1), (0.96, 0.4)),
    )  # fmt: skip
    around = {"device": "some CPU", "date": "2026-01-01", "torch": "2", "commit": "abc", "cuda": None}
    return {**json.loads(json.dumps(asdict(replace(row, **changed)))), "environment": around}


@pytest.mark.parametrize(("lost", "verdict"), [(0.01, "| reached |"), (0.011, "| **not reached** |")])
def test_page_says_whether_the_goal_is_reached(tmp_path: Path, lost: float, verdict: str) -> None:
    file = tmp_path / "rows.jsonl"
    better = replace(rows.TrainedPoint((0.4,), 0.98, 0.3, 0.955, 0.31, 0.32, (70, 30)))
    lines = [row_of(), row_of(criterion="margin", at_cost=better, twin_accuracy=0.955 + lost)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = training_page.page([file])
    assert verdict in text
    assert f"| eenet20 on mnist | {95.5 + 100 * lost:.2f} | 95.50 | {100 * lost:.2f} | 0.310 |" in text, (
        "margin is proposed"
    )
    assert "not measured" in text.lower() or "No speed was measured" in text


def test_page_takes_the_newest_row_and_speeds_of_one_comparison(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    speed = {
        "network": "eenet20 on mnist", "batch_size": 256, "setting": "no exits", "dtype": "float32",
        "images_per_s": [1, 1000, 1], "provider": "plain, ONNX Runtime", "best_static": "plain, ONNX Runtime",
        "realised_ratio": 1.0, "environment": row_of()["environment"],
    }  # fmt: skip
    fast = {
        **speed,
        "provider": "eefast resident",
        "setting": "own thresholds",
        "images_per_s": [1, 4321, 1],
        "realised_ratio": 1.3,
    }
    file = tmp_path / "rows.jsonl"
    old = row_of(twin_accuracy=0.5)
    old["environment"]["date"] = "2025-01-01"
    before = {**fast, "batch_size": 16, "environment": old["environment"]}
    lines = (row_of(), old, before, speed, fast)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    made_files = training_page.write([file], tmp_path)
    assert [path.suffix for path in made_files] == [".md", ".png"]
    text = made_files[0].read_text()
    assert "50.00" not in text
    assert "| 256 | plain, ONNX Runtime | 1,000 | eefast resident | 4,321 | 4.32 | 1.30 |" in text
    assert "| 16 |" not in text, "of the network before it"
    assert training_page.write([], tmp_path) == []


def test_page_has_a_section_per_seed(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    second = row_of(options={"epochs": 3, "seed": 2}, twin_accuracy=0.975)
    file.write_text("".join(json.dumps(line) + "\n" for line in (row_of(options={"epochs": 3, "seed": 1}), second)))
    text = training_page.page([file])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## eenet20 on mnist", "## eenet20 on mnist, seed 2",
    ]  # fmt: skip
    assert "| eenet20 on mnist | 96.50 |" in text
    assert "| eenet20 on mnist, seed 2 | 97.50 |" in text
    assert "(training-mnist-eenet20-seed-2-some-cpu.png)" in text
