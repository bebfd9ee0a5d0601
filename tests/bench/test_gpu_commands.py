"""The commands that measure on a GPU, from their options to their rows, on one that is not there."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ops
import parity
import pytest
import throughput
import torch
from cuda_on_cpu import NAME, stand_in
from fused_stages import Cudnn
from parity import EngineForm
from subjects import Network
from workloads import Workload

TINY = Network("eenet20", (3, 12, 12), 10, (0.0, 0.0, 1.0))


@pytest.fixture
def cuda(on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rows that the commands wrote."""
    with stand_in(monkeypatch):
        yield on_cpu


def options(monkeypatch: pytest.MonkeyPatch, *given: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cuda", *given])


def test_throughput(cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    works = (Workload(TINY, 4), Workload(TINY, 3))
    monkeypatch.setattr(throughput, "ON_GPU", {"compact": works, "resident": (Workload(TINY, 5),)})
    options(monkeypatch, "--engine", "compact", "--only", "batch 4", "--seconds", "1e9")
    assert throughput.main() == 0
    written = cuda()
    assert {row["batch_size"] for row in written} == {4}
    assert {row["environment"]["device"] for row in written} == {NAME}
    assert not [row["note"] for row in written if row["note"]]
    assert all(row["checked"] for row in written)
    shown = {row["provider"] for row in written}
    assert {"plain, eager", "plain, eager, CUDA graph", "eefast compact", "eefast resident"} <= shown
    out = capsys.readouterr().out
    assert all(name in out for name in shown)


def test_ops(cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def timed(call: Any, quantiles: list[float], **_: Any) -> Any:
        call()
        return [0.5] * len(quantiles) if len(quantiles) > 1 else 0.5

    Cudnn(monkeypatch)
    testing = SimpleNamespace(do_bench=timed, do_bench_cudagraph=timed)
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    ceilings = ops.measure_ceilings
    monkeypatch.setattr(ops, "measure_ceilings", lambda d, dtypes, *_: ceilings(d, dtypes, 2**10, 16, _[-1]))
    cases = {case.op: case for case in ops.gpu_cases() if case.dtype == torch.float32 or case.op != "exit_head"}
    small = [replace(case, samples=5, side=3, channels=16) for case in cases.values()]
    monkeypatch.setattr(ops, "gpu_cases", lambda: small)
    options(monkeypatch, "--seconds", "1e9")
    assert ops.main() == 0
    written = cuda()
    timings = [row for row in written if "op" in row]
    assert {row["op"] for row in timings} == set(cases)
    assert {row["timing"] for row in timings} == {"launch", "graph"}
    assert not [row["note"] for row in timings if row["note"]]
    assert {row["environment"]["device"] for row in written} == {NAME}
    assert "exit_head" in capsys.readouterr().out


def test_parity(cuda: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The networks are the real ones, with few images."""
    monkeypatch.setattr(parity, "BATCH_SIZES", (1, 3))
    monkeypatch.setattr(parity, "forms", lambda device: [EngineForm("compact", torch.float32)])
    monkeypatch.setattr(parity, "SUBJECTS", {parity.ON_NOISE: parity.on_noise})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert parity.main(["--device", "cuda", "--images", "5", "--seconds", "1e9"]) == 0
    assert not torch.backends.cudnn.allow_tf32
    written = cuda()
    assert [row["batch_size"] for row in written] == [1, 3]
    assert not [row["note"] for row in written if row["note"]]
    assert {row["environment"]["device"] for row in written} == {NAME}
    assert parity.ON_NOISE in capsys.readouterr().out
