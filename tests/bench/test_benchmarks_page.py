"""docs/benchmarks.md: made from the committed rows, every number in it is one of theirs, losses are not left out."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

import benchmarks_page as page  # noqa: E402
import rows  # noqa: E402
import training_page  # noqa: E402
from selection import cases_of, measured_networks  # noqa: E402

FILES = sorted((ROOT / "bench" / "results").glob("*.jsonl"))


def test_the_committed_page_is_what_the_committed_rows_give() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert text == page.page(FILES, page.DEMO), "run make report"
    shown = re.findall(r"\((benchmarks/[^)]*)\)", text)
    assert len(shown) == len(set(shown)) > 0
    there = {f"benchmarks/{path.name}" for path in (ROOT / "docs" / "benchmarks").iterdir()}
    assert set(shown) == there, "run make report, and delete what it no longer makes"


def test_the_committed_page_of_trained_networks_is_what_the_committed_rows_give() -> None:
    path = ROOT / "bench" / "results" / training_page.PAGE
    text = path.read_text() if path.exists() else ""
    assert text == training_page.page(FILES), "run make report"
    shown = set(re.findall(r"\((training-[^)]*png)\)", text))
    assert shown == {figure.name for figure in path.parent.glob("training-*.png")}


def test_every_speed_is_one_of_a_row() -> None:
    rows = [json.loads(line) for file in FILES for line in file.read_text().splitlines()]
    speeds = {f"{r['images_per_s'][1]:,.0f}" for r in rows if "network" in r and r["images_per_s"]}
    cells = re.findall(r"\| ([\d,]{3,}) \(\d+\.\d\d\)", page.page(FILES))
    assert len(cells) > 50
    assert set(cells) <= speeds


def line_of(tmp_path: Path, **changed: object) -> Path:
    rows = [json.loads(line) for line in FILES[0].read_text().splitlines()]
    row = next(r for r in reversed(rows) if r.get("setting") == "no exits" and r["provider"] == "eefast resident")
    slow = {**row, "images_per_s": [1, 2, 3], "realised_ratio": 0.01, **changed}
    other = {**row, "provider": "plain, ONNX Runtime", "images_per_s": [100, 200, 300], "realised_ratio": 1.0}
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in (row, slow, other)))
    return file


def test_the_newest_row_counts_and_a_loss_is_reported(tmp_path: Path) -> None:
    text = page.page([line_of(tmp_path)])
    assert "| eefast resident | 2 (0.01) |" in text
    assert "eefast resident is slower than another way in 1 of 1 cases:" in text
    assert "plain, ONNX Runtime is 100.00×" in text


def test_what_was_not_timed_is_no_number(tmp_path: Path) -> None:
    text = page.page([line_of(tmp_path, provider="eefast other", images_per_s=None)])
    assert "eefast other" not in text


ENVIRONMENT = {
    **{"device": "Abacus", "cuda": None, "capability": "BEADS", "threads": 2, "torch": "2", "commit": "abc"},
    "date": "2026-01-02T03:04:05+00:00",
}


def written(path: Path, made: list[Any], **around: Any) -> Path:
    """Rows, or their dataclasses, appended to a file."""
    lines = [row if isinstance(row, dict) else asdict(row) for row in made]
    with path.open("a") as file:
        file.writelines(json.dumps({**row, "environment": {**ENVIRONMENT, **around}}) + "\n" for row in lines)
    return path


def network(provider: str, batch_size: int, setting: str, speed: float, dtype: str = "float32") -> rows.NetworkRow:
    cost = 1.0 if setting == "no exits" else float(setting.split()[1]) if setting.startswith("cost") else 0.5
    more = {"images_per_s": (0.9 * speed, speed, 1.1 * speed), "mean_cost": cost, "realised_ratio": 1.0}
    return rows.NetworkRow("net", provider, batch_size, dtype, (0.5, 0.5), True, setting=setting, **more)


def test_a_retrained_network_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    made = [network("plain, ONNX Runtime", 4, "no exits", 10), network("eefast resident", 4, "own thresholds", 20)]
    written(tmp_path / "r.jsonl", made, commit="1234567")
    other = [replace(row, mix=(0.25, 0.75), images_per_s=(30, 33, 36)) for row in made]
    text = page.page([written(tmp_path / "r.jsonl", other, commit="89abcde")])
    assert "| eefast resident |  | 33 (1.00) |" in text
    assert "89abcde" in text
    assert "1234567" not in text


def test_speed_ups_are_over_the_fastest_way_without_exits_of_the_same_dtype(tmp_path: Path) -> None:
    made = [
        *(network("plain, eager", n, "no exits", 100) for n in (1, 31)),
        network("plain, ONNX Runtime", 31, "no exits", 200),
        network("masked, PyTorch", 31, "no exits", 999),
        *(network(f"eefast {engine}", 31, "no exits", speed) for engine, speed in (("compact", 50), ("resident", 150))),
        *(network("eefast resident", n, "cost 0.25", speed) for n, speed in ((31, 900), (1, 30), (257, 5))),
        network("eefast resident, bfloat16", 31, "cost 0.25", 9000, "bfloat16"),
    ]
    file = written(tmp_path / "rows.jsonl", made)
    (machine,) = page.machines([file])
    found = page.speed_ups(cases_of(measured_networks(machine)))
    assert found == {"net": {(31, "cost 0.25"): 4.5, (1, "cost 0.25"): 0.3, (31, "no exits"): 0.75}}
    # The setting of lowest cost comes first.
    assert next(iter(found["net"]))[1] == "cost 0.25"
    text = page.page([file])
    assert "eefast is slower in 2 of 3 cells; the lowest is 0.30 at net, batch 1, cost 0.25." in text
    assert "(benchmarks/abacus-beads-speed-up.png)" in text


def test_costs_in_macs_and_in_time(tmp_path: Path) -> None:
    made = [
        *(network("eefast resident", n, "cost 0.25", speed) for n, speed in ((31, 900), (1, 30))),
        *(network("eefast compact", n, "cost 0.25", 100) for n in (31, 1)),
        *(network(name, 31, "no exits", 100) for name in ("eefast resident", "plain, eager")),
    ]
    assert "in time" not in page.page([written(tmp_path / "old.jsonl", made)])
    made = [replace(row, time_cost=1.0 if row.mean_cost == 1 else 0.5, time_way="PyTorch") for row in made]
    made = [replace(row, realised_ratio=None if "compact" in row.provider else 2.0) for row in made]
    text = page.page([written(tmp_path / "new.jsonl", made)])
    assert "### Costs in MACs and in time" in text
    assert "| net | 31 | cost 0.25 | eefast resident | 0.25 | 0.50 | 2.00 | 4.00 |" in text
    assert text.count("| net | 1 | cost 0.25 | eefast") == 0, "the fastest way there has no ratio"


def in_both_precisions() -> list[rows.NetworkRow]:
    made = [
        network("plain, ONNX Runtime", 31, "no exits", 100),
        network("plain, OpenVINO int8", 31, "no exits", 300, "int8"),
        network("eefast resident", 31, "no exits", 200),
        network("eefast resident, int8", 31, "no exits", 450, "int8"),
    ]
    statics = {"float32": "plain, ONNX Runtime", "int8": "plain, OpenVINO int8"}
    speeds = {"float32": 100, "int8": 300}
    found = []
    for row in made:
        other = "int8" if row.dtype == "float32" else "float32"
        assert row.images_per_s
        ratios = [row.images_per_s[1] / speeds[dtype] for dtype in (row.dtype, other)]
        more = {"best_static": statics[row.dtype], "across_static": statics[other], "other_answers": 7}
        found.append(replace(row, realised_ratio=ratios[0], across_ratio=ratios[1], exits=(0, 56), **more))
    return found


def test_precisions_are_compared_within_and_across(tmp_path: Path) -> None:
    text = page.page([written(tmp_path / "rows.jsonl", in_both_precisions())])
    static = "plain, ONNX Runtime | plain, OpenVINO int8"
    assert f"| net | 31 | no exits | {static} | 200 | 450 | 2.00 | 1.50 | 0.67 | 4.50 | 12.5% |" in text
    assert "(benchmarks/abacus-beads-int8-speed-up.png)" in text
    assert text.count("eefast is slower in 0 of 1 cells.") == 2


def test_one_thread_stands_beside_several(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", in_both_precisions())
    written(file, [network("eefast resident", 31, "no exits", 111)], threads=1)
    text = page.page([file])
    for title, speed in (
        ("2 threads", "| eefast resident | 200 (2.00) |"),
        ("1 thread", "| eefast resident | 111 (1.00) |"),
    ):
        assert f"## Abacus, BEADS, {title}\n" in text
        assert speed in text


def test_accuracy_in_int8_is_the_newest(tmp_path: Path) -> None:
    row = rows.Int8Row(
        "eenet20 on mnist", "float32", "learned", "recalibrated", (0.5,), 400, 256, 0.99, 0.2, (300, 100), 0, 0, 0.995
    )
    old, new = (replace(row, way="int8", accuracy=a, elsewhere=20, details="F(2, 3)") for a in (0.5, 0.9875))
    file = written(tmp_path / "rows.jsonl", [row, old])
    text = page.page([written(file, [new], date="2026-01-03T00:00:00+00:00")])
    assert (
        "| eenet20 on mnist, learned | int8 | recalibrated | 98.75% | 20.00% | 5.00% | 0.00% | 99.50% | F(2, 3) |"
        in text
    )
    assert "50.00%" not in text
    assert "- NOT REACHED: eenet20 on mnist, int8: recalibrated, ≤ 0.2 points less: +0.25, at mean cost 20.00%" in text


def latency(provider: str, scenario: str, offered: float | None, p99: float, load: float | None = None) -> Any:
    return rows.LatencyRow(
        *(scenario, "net", provider, "cost 0.5", 8, True), load=load, offered=offered, images_per_s=offered or 1000,
        milliseconds=(p99 / 3, p99 / 2, p99), images=257, batch=1.5,
    )  # fmt: skip


def test_latency_is_of_the_last_run_and_its_losses_are_reported(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [latency("plain, eager", "Server", 12345, 77.77)])
    made = [
        *(latency("plain, eager", "Server", offered, p99, offered / 200) for offered, p99 in ((60, 9.0), (180, 99.0))),
        *(latency("eefast call", "Server", offered, p99, offered / 200) for offered, p99 in ((60, 18.0), (180, 33.0))),
        latency("eefast call", "Server", 800.0, 50.0, 4.0),
        latency("eefast call", "SingleStream", None, 3.0),
        rows.LatencyRow("Server", "net", "eefast stream", "cost 0.5", 8, True, note="reads ahead"),
    ]
    text = page.page([written(file, made, date="2026-01-03T00:00:00+00:00")])
    assert "| net, cost 0.5 | Server | eefast call | 0.30 | 60 | 60 | 6.00 | 9.00 | 18.00 | 1.5 |" in text
    assert "77.77" not in text
    assert "eefast's p99 is longer than another way's in 1 of 2 cases:" in text
    assert "- net, cost 0.5, Server at 60/s: p99 is 2.00× that of plain, eager" in text
    assert "- net, Server, eefast stream: reads ahead" in text
    assert "Latency" not in page.page([line_of(tmp_path)])


def op(name: str, flops: int, microseconds: float, timing: str = "launch", samples: int = 31) -> rows.OpRow:
    return rows.OpRow(
        *(name, "eefast", timing, samples, 64, 8, 8, 10, "float32", "contiguous", "learned", 0.5, 1000, flops, True),
        typical=microseconds,
    )


def ceilings(copy: float) -> list[rows.CeilingRow]:
    return [rows.CeilingRow("copy", "uint8", copy), rows.CeilingRow("matmul", "float32", 0.2)]


def test_the_roofline_is_of_one_run(tmp_path: Path) -> None:
    file = written(tmp_path / "rows.jsonl", [*ceilings(10.0), op("exit_head", 500, 9.0)])
    made = [*ceilings(20.0), op("exit_head", 500, 2.0), op("exit_head", 500, 1.0, "graph"), op("compact", 0, 1.0)]
    written(file, [*made, op("exit_head", 500, 4.0, samples=1)], date="2026-01-03T00:00:00+00:00", commit="def")
    # A run without ops is none of theirs.
    peak = rows.CeilingRow("multiply-adds of one core", "float32", 50.0)
    written(file, [peak], date="2026-01-04T00:00:00+00:00")
    (machine,) = page.machines([file])
    marks, roofs, idle = page.roofline(machine)
    assert sorted((row["samples"], row["typical"]) for row in marks) == [(1, 4.0), (31, 1.0)]
    assert [row["value"] for row in roofs] == [20.0, 0.2]
    assert idle == ["compact"]
    text = page.page([file])
    assert "Left out, since it computes nothing: compact. Commit def (2026-01-03)." in text


def test_a_later_run_of_fewer_cases_draws_no_roofline(tmp_path: Path) -> None:
    cases = [op("exit_head", 500, 2.0), op("exit_head", 500, 4.0, samples=1)]
    file = written(tmp_path / "rows.jsonl", [*ceilings(20.0), *cases])
    written(file, [*ceilings(10.0), op("exit_head", 500, 1.0)], date="2026-01-03T00:00:00+00:00")
    (machine,) = page.machines([file])
    assert [row["typical"] for row in page.roofline(machine)[0]] == [2.0, 4.0]


def test_accuracy_is_shown_beside_speed(tmp_path: Path) -> None:
    text = page.page([], page.DEMO)
    demo = json.loads(page.DEMO.read_text())
    for row in demo["rows"]:
        line = f"| {row['name']} | {row['accuracy']:.2%} | {row['images_per_s']:,.0f} | {row['mean_cost']:.3f} |"
        assert (line in text) == (row["images"] == 10_000), "on fewer images, accuracies would not compare"
    assert "Accuracy" not in page.page([])


def test_trained_networks_are_shown_too(tmp_path: Path) -> None:
    def trained(criterion: str, held_out: float, accuracy: float) -> rows.TrainingRow:
        point = rows.TrainedPoint((0.5,), held_out, 0.3, accuracy, 0.5, 0.5, (1, 1))
        return rows.TrainingRow(
            *("mnist", "net", criterion, (0.5, 1.0), {}, {}, (1.0, 1.0), 31, 0.01, 0.4, 0.98, 0.97, (0.9, 0.96)),
            *(None, point, "", ()),
        )

    # Test images decide nothing, so the criterion that was better on held-out ones is shown.
    made: list[Any] = [trained("entropy", 0.90, 0.94), trained("learned", 0.95, 0.93)]
    file = written(tmp_path / "rows.jsonl", made)
    assert "Accuracy" not in page.page([file])
    for n in (1, 31):
        made = [
            network("plain, eager", n, "no exits", 100 * n),
            network("eefast resident", n, "own thresholds", 400 * n),
        ]
        made.append(network("eefast resident, bfloat16", n, "own thresholds", 999, "bfloat16"))
        written(file, [{**asdict(row), "network": "net on mnist"} for row in made])
    text = page.page([file])
    assert "| plain, eager | 97.00% | 3,100 | 1.000 |" in text
    assert "| eefast resident | 93.00% | 12,400 | 0.500 |" in text
    # How accurate that is was not measured.
    assert "bfloat16 | 93" not in text


def test_figures_are_those_that_the_page_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    file = written(tmp_path / "rows.jsonl", [*ceilings(20.0), op("exit_head", 500, 2.0)])
    written(file, [latency("eefast call", "Server", 60, 9.0, 0.3), latency("eefast call", "Server", 90, 9.5, 0.5)])
    written(file, [network("plain, eager", 1, "no exits", 10), network("eefast resident", 1, "no exits", 10)])
    made = page.draw([file], tmp_path / "figures", page.DEMO)
    assert {f"benchmarks/{path.name}" for path in made} == set(
        re.findall(r"\((benchmarks/[^)]*)\)", page.page([file], page.DEMO))
    )
    assert len(made) == 5
    assert all(path.stat().st_size < 100_000 for path in made)
    assert all(len(Image.open(path).convert("RGB").getcolors()) > 5 for path in made)


def test_accuracy_stands_beside_speeds_of_the_same_network_alone() -> None:
    trained = {"exit_costs": (0.1, 0.4, 1.0), "at_cost": {"cost": 0.3}}
    timed = {"mix": [0.6, 0.3, 0.1], "mean_cost": 0.32}
    assert page._is_timed(timed, trained)
    assert not page._is_timed({**timed, "mix": [0.25] * 4}, trained)
    assert not page._is_timed({**timed, "mean_cost": 0.4}, trained)
