"""bench/training.py: trains a network and its twin for real, counts what they are worth, and says what went wrong."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from idx_files import idx_bytes

import eefast
from eefast.data.mnist import mnist_test

ROOT = Path(__file__).parents[2]

import rows  # noqa: E402
import training  # noqa: E402
import training_page  # noqa: E402
from training import Goal, Training, train, worth  # noqa: E402

TINY = Training("mnist", "eenet8", {"num_exits": 2, "epochs": 1, "batch_size": 32})
BEGUN = replace(TINY, options={**TINY.options, "head": "conv1"}, first={"epochs": 1})


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """600 of the shipped images as training images, the next 257 as test images."""
    images, labels = mnist_test()
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    for stem, part in (("train", slice(0, 600)), ("t10k", slice(600, 857))):
        for kind, values in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part].to(torch.uint8))):
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values.numpy()), 1))
    monkeypatch.setattr(training, "HELD_OUT", 101)
    return tmp_path / "data"


@pytest.fixture(scope="module")
def in_forks() -> Iterator[Callable[..., SimpleNamespace]]:
    """`subprocess.run` of `python -m eefast`, but in a fork of one process, since a start of Python takes seconds."""
    script = ROOT / "tests" / "helpers" / "commands_in_forks.py"
    lock = threading.Lock()
    with subprocess.Popen([sys.executable, script], stdin=PIPE, stdout=PIPE, text=True) as process:

        def run(command: list[str], stdout: TextIO, stderr: TextIO, **_: Any) -> SimpleNamespace:
            assert command[:3] == [sys.executable, "-m", "eefast"]
            with lock:
                print(json.dumps({"words": command[3:]}), file=process.stdin, flush=True)
                ended = json.loads(process.stdout.readline())
            stdout.write(ended["out"])
            stderr.write(ended["err"])
            return SimpleNamespace(returncode=ended["code"])

        yield run
        process.stdin.close()


def made(folder: Path, plan: Training = TINY) -> None:
    """As after training, but with random weights."""
    for i, run in enumerate(plan.both(folder)):
        torch.manual_seed(i)
        net = eefast.zoo.eenet(plan.net, num_classes=10, input_shape=(1, 28, 28), normalization=((0.1307,), (0.3081,)))
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net.train().all_exits(net.prepare(mnist_test()[0][:64]))
        net.eval().save(run.output)
        report = {"arguments": run.options, "seconds_per_epoch": [1.5, 2.5]}
        (run.output / training.REPORT_FILE).write_text(json.dumps(report))


def test_trains_both_and_says_what_went_wrong_with_another(
    root: Path, tmp_path: Path, in_forks: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.subprocess, "run", in_forks)
    wrong = Training("mnist", "eenet20", {**TINY.options, "batch_size": 10_000})
    notes = train([TINY, wrong], tmp_path / "runs", "cpu", root, 1800)
    right, failed = (dict.fromkeys(run.output for run in plan.both(tmp_path / "runs")) for plan in (TINY, wrong))
    assert notes.keys() == {**right, **failed}.keys()
    assert all(notes[path].startswith("exit code 2") and "batch_size=10000" in notes[path] for path in failed)
    assert [notes[path] for path in right] == ["", ""]
    early, twin = (json.loads((path / "report.json").read_text()) for path in right)
    assert early["arguments"]["loss"] != twin["arguments"]["loss"] == "final_supervision"
    heads = [eefast.load(path).heads[0].classifier.weight for path in right]
    assert not torch.equal(*heads), "the twin's early exits learn nothing"

    before = [path.stat().st_mtime_ns for folder in right for path in folder.iterdir()]
    assert set(train([TINY], tmp_path / "runs", "cpu", root, 0).values()) == {""}, "what is there takes no second"
    assert before == [path.stat().st_mtime_ns for folder in right for path in folder.iterdir()]
    assert "not begun within the budget of seconds" in train([wrong], tmp_path / "runs", "cpu", root, 0).values()
    with pytest.raises(ValueError, match="was trained with epochs=1, not 2; delete or move it"):
        train([replace(TINY, options={**TINY.options, "epochs": 2})], tmp_path / "runs", "cpu", root, 0)


def test_both_go_on_from_the_plain_network_and_only_one_gets_convolutions_in_its_heads(
    root: Path, tmp_path: Path, in_forks: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.subprocess, "run", in_forks)
    begin, (early, twin) = BEGUN.begin(tmp_path), BEGUN.both(tmp_path)
    assert begin is not None
    assert train([BEGUN], tmp_path, "cpu", root, 1800) == dict.fromkeys((begin.output, early.output, twin.output), "")
    assert [eefast.load(run.output).heads[0].kind for run in (begin, early, twin)] == ["pool", "conv1", "pool"]
    reports = [json.loads((run.output / "report.json").read_text()) for run in (begin, early, twin)]
    assert [report["arguments"]["weights"] for report in reports] == [None, begin.output.name, begin.output.name]
    assert "exits [0, 1] start from random weights" in (early.output / training.LOG_FILE).read_text()
    assert "random weights" not in (twin.output / training.LOG_FILE).read_text()


def test_rows_say_what_the_network_itself_answers(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(training, "GOALS", {"mnist": Goal(0.2, 0.8)})
    found = worth(TINY, tmp_path, root)
    assert [row.criterion for row in found] == list(eefast.criteria.CRITERIA)
    pixels, labels = (part[600:857] for part in mnist_test())
    twin = eefast.load(TINY.both(tmp_path)[1].output).eval()
    with torch.no_grad():
        alone = twin.plain()(twin.prepare(pixels)).argmax(dim=1)
    for row in found:
        point = row.at_cost
        assert point is not None
        net = eefast.load(TINY.both(tmp_path)[0].output).with_criterion(row.criterion, point.thresholds).eval()
        answer = net(pixels)
        assert point.accuracy == pytest.approx(float((answer.labels == labels).double().mean()), abs=1e-9)
        assert point.cost == pytest.approx(float(answer.cost.double().mean()), abs=1e-6)
        assert point.held_out_cost <= training.CAUTION * 0.8
        assert sum(point.exits) == row.test_images == 257
        assert row.twin_accuracy == pytest.approx(float((alone == labels).double().mean()), abs=1e-9)
        assert row.seconds == (4.0, 4.0)
        assert row.curve


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
    file.write_text("".join(json.dumps(line) + "\n" for line in (row_of(), old, speed, fast)))
    made_files = training_page.write([file], tmp_path)
    assert [path.suffix for path in made_files] == [".md", ".png"]
    text = made_files[0].read_text()
    assert "50.00" not in text
    assert "| 256 | plain, ONNX Runtime | 1,000 | eefast resident | 4,321 | 4.32 | 1.30 |" in text
    assert training_page.write([], tmp_path) == []
