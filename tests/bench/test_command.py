"""What commands of bench/ share: the device asked for, and an exit code that says whether answers were wrong."""

import json
from argparse import ArgumentParser
from dataclasses import asdict

import command
import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import torch
from rows import NetworkRow, OpRow


@pytest.mark.parametrize(
    ("words", "there", "device"),
    [([], False, "cpu"), ([], True, "cuda"), (["--device", "cpu"], True, "cpu"), (["--device", "cuda"], True, "cuda")],
    ids=["no GPU", "a GPU", "the CPU beside a GPU", "the GPU"],
)
def test_the_device_that_is_measured(monkeypatch, words, there, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    parser = ArgumentParser()
    command.add_device_option(parser)
    assert command.chosen_device(parser, parser.parse_args(words), "measure") == device


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = ArgumentParser()
    command.add_device_option(parser)
    with pytest.raises(SystemExit, match="2"):
        command.chosen_device(parser, parser.parse_args(["--device", "cuda"]), "train on")
    assert "leave the option out to train on the CPU" in capsys.readouterr().err


def network(note):
    return NetworkRow("net", "way", 1, "float32", (), False, note)


def op(provider, note):
    shape = {"samples": 1, "channels": 1, "height": 1, "width": 1, "classes": 1, "dtype": "float32", "exit_rate": 0.5}
    more = {"layout": "channels_last", "criterion": "learned", "bytes": 1, "flops": 1, "checked": False, "note": note}
    return OpRow("exit_head", provider, "launch", **shape, **more)


@pytest.mark.parametrize(
    ("row", "status"),
    [
        pytest.param(network("WRONG: 1 of 2"), 1, id="a wrong answer"),
        pytest.param(network("not installed"), 0, id="a peer that is not there"),
        pytest.param(op("eefast", "RuntimeError: no"), 1, id="an op that does not run"),
        pytest.param(op("eefast", "skipped: no time"), 0, id="an op that was skipped"),
        pytest.param(op("eager", "RuntimeError: no"), 0, id="another way that does not run"),
    ],
)
def test_the_exit_code_and_what_is_shown(monkeypatch, tmp_path, capsys, row, status):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    around = {**rows.environment("cpu"), "date": "2026-11-26T00:00:02"}
    before = {**asdict(network("WRONG: before")), "environment": {**around, "date": "2026-11-26T00:00:01"}}
    rows.results_file(around).write_text(json.dumps(before) + "\n")
    rows.append([row], around)
    assert command.conclude(around) == status
    shown = capsys.readouterr().out
    assert f"! {row.note}" in shown
    assert "before" not in shown
