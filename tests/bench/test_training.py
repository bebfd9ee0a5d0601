"""bench/training.py: trains a network and its twin for real, counts what they are worth, and says what went wrong."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from idx_files import idx_bytes

import eefast
from eefast.cost import macs
from eefast.data.mnist import mnist_test
from eefast.train.options import TrainOptions

ROOT = Path(__file__).parents[2]

import training  # noqa: E402
from training import TRAININGS, Goal, Training, train, worth  # noqa: E402

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
        exits = plan.options["num_exits"]
        net = eefast.zoo.eenet(
            plan.net, exits, num_classes=10, input_shape=(1, 28, 28), normalization=((0.1307,), (0.3081,))
        )
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        net.train().all_exits(net.prepare(mnist_test()[0][:64]))
        net.eval().save(run.output)
        report = {"arguments": run.options, "seconds_per_epoch": [1.5, 2.5]}
        (run.output / training.REPORT_FILE).write_text(json.dumps(report))


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_network_learns_from_its_twin(
    root: Path, tmp_path: Path, in_forks: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.subprocess, "run", in_forks)
    plan = replace(TINY, options={**TINY.options, "loss": "final_supervision+taught"})
    early, twin = (run.output for run in plan.both(tmp_path))
    assert train([plan], tmp_path, "cpu", root, 1800) == dict.fromkeys((twin, early), "")
    assert [json.loads((run / "report.json").read_text())["arguments"]["teacher"] for run in (early, twin)] == [
        twin.name, None,
    ]  # fmt: skip
    wrong = replace(plan, net="eenet20", options={**plan.options, "batch_size": 10_000})
    assert train([wrong], tmp_path, "cpu", root, 1800)[wrong.both(tmp_path)[0].output].startswith("not begun: ")


def test_another_seed_is_another_network_that_its_own_twin_teaches(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(TINY, options={**TINY.options, "loss": "final_supervision+taught"}, smaller=("resnet8",))
    first, second = plan, replace(plan, seed=2)
    assert (str(first), str(second)) == ("eenet8 on mnist", "eenet8 on mnist, seed 2")
    early, twin = second.both(tmp_path)
    assert early.options["seed"] == twin.options["seed"] == 2 != first.both(tmp_path)[0].options["seed"]
    assert early.teacher == twin.output == tmp_path / "mnist-eenet8-seed2-twin" != first.both(tmp_path)[1].output
    assert {run.teacher for run in second.alone()[0].runs(tmp_path)} == {None, twin.output}
    parts = {}
    monkeypatch.setattr(training, "collect", lambda net, images: ([], torch.cat([labels for _, labels in images])))
    for each in (first, second):
        held_out, test = training.seen(torch.nn.Identity(), each, root)  # type: ignore[arg-type]
        parts[each.seed] = held_out.labels
        assert len(held_out.labels) == 101
        assert torch.equal(test.labels, mnist_test()[1][600:857])
    assert not torch.equal(parts[1], parts[2])


def test_rows_say_what_the_network_itself_answers(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(tmp_path)
    monkeypatch.setattr(training, "GOALS", {"mnist": Goal(0.2, 0.8)})
    found = worth(TINY, tmp_path, root)
    assert [row.criterion for row in found] == [*eefast.criteria.CRITERIA, "carried"]
    pixels, labels = (part[600:857] for part in mnist_test())
    twin = eefast.load(TINY.both(tmp_path)[1].output).eval()
    with torch.no_grad():
        alone = twin.plain()(twin.prepare(pixels)).argmax(dim=1)
    for row in found:
        point = row.at_cost
        assert point is not None
        net = training.chosen(TINY, tmp_path, [row], root)
        assert net is not None
        assert net.criterion.name == row.criterion
        answer = net(pixels)
        assert point.accuracy == pytest.approx(float((answer.labels == labels).double().mean()), abs=1e-9)
        assert point.cost == pytest.approx(float(answer.cost.double().mean()), abs=1e-6)
        assert point.held_out_cost <= training.CAUTION * 0.8
        for cost, at_goal in row.at_goals:
            assert cost == 0.12
            assert at_goal.held_out_cost <= training.CAUTION * 0.12
        assert sum(point.exits) == row.test_images == 257
        assert row.twin_accuracy == pytest.approx(float((alone == labels).double().mean()), abs=1e-9)
        assert row.seconds == (4.0, 4.0)
        assert row.curve
        assert row.macs == macs(twin.plain(), (1, 28, 28))[0]


def test_rows_of_smaller_networks_are_those_that_are_trained(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(TINY, smaller=("resnet8", "eenet14"))
    small = plan.alone()[0]
    assert (str(small), small.options["placement"], small.first) == ("resnet8 on mnist", [1], {})
    made(tmp_path, small)
    (row,) = training.worth_alone(plan, tmp_path, root)
    net = eefast.load(small.both(tmp_path)[1].output).eval()
    pixels, labels = (part[600:857] for part in mnist_test())
    right = (net.plain()(net.prepare(pixels)).argmax(dim=1) == labels).double().mean()
    assert (row.plain, row.trained_on, row.seconds) == ("resnet8", "mnist", (4.0,))
    assert row.accuracy == pytest.approx(float(right), abs=1e-9)
    assert row.macs == macs(eefast.zoo.resnet("resnet8", 10, (1, 28, 28)), (1, 28, 28))[0]


@pytest.mark.parametrize("device", TRAININGS)
def test_options_are_those_of_train_and_twins_do_without_early_exits(device: str) -> None:
    plans = list(TRAININGS[device])
    teachers = {str(small): plan for plan in plans for small in plan.alone()}
    plans += [small for plan in TRAININGS[device] for small in plan.alone()]
    runs = {str(plan): (plan.begin(Path("x")), *plan.both(Path("x"))) for plan in plans}
    for name, (begin, early, twin) in runs.items():
        for run in (begin, early, twin):
            if run is not None:
                TrainOptions(**run.options, teacher=run.teacher)
        assert twin.options["loss"] == "final_supervision" != early.options["loss"]
        assert not {"head", "balance_gradients"} & twin.options.keys()
        assert twin.options["epochs"] == early.options["epochs"]
        assert early.weights == twin.weights == (begin and begin.output)
        expected = teachers[name].both(Path("x"))[1] if name in teachers else twin
        assert early.teacher == (expected.output if "taught" in early.options["loss"] else None)
    outputs = [run.output.name for three in runs.values() for run in three if run is not None]
    assert len(set(outputs)) == len(outputs)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in outputs)
