"""A small network with the answers of all its exits, and the ways of a GPU on the CPU, for the tests of bench/."""

import gpu_ways
import network_runs
import pytest
import rows
import torch
from networks import images, lived_in
from subjects import Subject

from eefast import zoo
from eefast.thresholds.outputs import collect

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def subject():
    net, x = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5), images(64, SHAPE)
    return Subject(net, x, collect(net, [(x, torch.zeros(len(x)))])[0])


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The ways of a GPU, run here: nothing to wait for, no graphs, nothing compiled; rows go to a fresh folder."""
    monkeypatch.setattr(gpu_ways, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_ways, "DTYPE", torch.float32)
    monkeypatch.setattr(network_runs, "ROUNDS", 2)
    for name, value in {"ROUND_SECONDS": 0.0, "MOST_BATCHES": 3, "CALIBRATED": 64}.items():
        monkeypatch.setattr(gpu_ways, name, value)
    monkeypatch.setattr(gpu_ways, "captured", lambda call, x: call)
    monkeypatch.setattr(gpu_ways, "busy_seconds", lambda run: run() and 1e-6)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    gpu_ways.subject.cache_clear()
    gpu_ways.plain.cache_clear()
    yield lambda: rows.read(tmp_path.glob("*.jsonl"))
    gpu_ways.subject.cache_clear()
    gpu_ways.plain.cache_clear()
