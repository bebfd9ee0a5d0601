"""Profiles of a GPU's ways: kernels and gaps from a trace, and the whole command on the CPU with a small network."""

import gzip
import json

import gpu_profile
import pytest
import torch
from subjects import Network
from torch.autograd import DeviceType
from workloads import Workload

TINY = Workload(Network("eenet20", (3, 12, 12), 10, (0.0, 0.0, 1.0)), 4, (0.5,))
# Two batches: 20 µs of one kernel beside 10 µs of another, a gap of 15, 5 µs, a gap of 5, 10 µs.
KERNELS = [("long", 50, 60), ("long", 0, 20), ("short", 5, 15), ("short", 35, 40), ("odd", 45, 45)]


def test_kernels_and_gaps_of_a_trace():
    found = gpu_profile.summary(KERNELS, 2)
    assert found == {
        "microseconds": 30.0, "busy": 17.5, "gaps": [15, 5, 5], "launches": 2.5,
        "kernels": [["long", 1.0, 15.0], ["short", 1.0, 7.5], ["odd", 0.5, 0.0]],
    }  # fmt: skip
    assert gpu_profile.summary([], 2) == {"kernels": []}


@pytest.mark.parametrize("way", ["eefast compact", "eefast resident, streaming", "plain, eager, CUDA graph"])
@pytest.mark.sampled(1)
def test_a_profile_of_each_kind_of_way(on_cpu, monkeypatch, tmp_path, capsys, way):
    monkeypatch.setattr(gpu_profile, "KERNELS", DeviceType.CPU)
    monkeypatch.setattr(gpu_profile, "PROFILED", ((TINY, way), (TINY, "no such way")))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["gpu_profile.py"])
    assert gpu_profile.main() == 1
    found, failed = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert found["profile"] == str(TINY)
    assert 0 < found["busy"] <= found["microseconds"]
    assert 1 < len(found["kernels"]) <= gpu_profile.MOST_KERNELS
    assert failed["failed"].startswith("ValueError")
    with gzip.open(tmp_path / "trace-0.json.gz") as trace:
        assert json.load(trace)["traceEvents"]


@pytest.mark.gpu
@torch.no_grad()
def test_kernels_of_a_gpu_are_seen():
    x = torch.ones(100, device="cuda")
    names = [name for name, _, _ in gpu_profile.profiled(lambda: x + x, None)]
    assert len(names) == 1
