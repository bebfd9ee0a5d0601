"""`eefast calibrate-device`: the measured times are printed and written; without a GPU nothing is measured."""

import json

import pytest
import torch
from command_line import run

from eefast.planning import launch_costs
from eefast.planning.launch_costs import LaunchCosts


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """A CUDA device, and the devices that were measured."""
    seen = []

    def measure(device):
        seen.append(str(device))
        return LaunchCosts(launch=2.5e-6, wait=1.25e-5)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(launch_costs, "measure", measure)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    return seen


def test_the_times_are_printed_kept_and_written(measured, tmp_path):
    done = run("calibrate-device", "--device", "cuda:1", "--json", tmp_path / "times.json")
    assert measured == ["cuda:1"]
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:2] == [
        "launch of a CUDA graph, on the host 2.5 µs",
        "wait for a count, the device idle 12.5 µs",
    ]
    assert lines[-1] == f"kept in {launch_costs.path(torch.device('cuda:1'))}"
    assert json.loads((tmp_path / "times.json").read_text()) == {"launch": 2.5e-6, "wait": 1.25e-5}
    assert launch_costs.load(torch.device("cuda:1")) == LaunchCosts(2.5e-6, 1.25e-5)
    assert len(measured) == 1


def test_json_on_stdout_is_nothing_but_json(measured):
    assert json.loads(run("calibrate-device", "--json", "-").stdout) == {"launch": 2.5e-6, "wait": 1.25e-5}


@pytest.mark.parametrize(
    ("words", "available", "message"),
    [
        ([], False, r"device='cuda': PyTorch finds no CUDA device here; the CPU needs no calibration"),
        (["--device", "cpu"], True, r"device='cpu' needs no calibration"),
        (["--json", "/nowhere/times.json"], True, "there is no folder"),
    ],
    ids=["no device", "the CPU", "no place for the file"],
)
def test_it_refuses_before_it_measures(measured, monkeypatch, words, available, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(ValueError, match=message):
        run("calibrate-device", *words)
    assert measured == []
