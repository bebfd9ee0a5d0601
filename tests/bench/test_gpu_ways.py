"""The ways of a GPU, run on the CPU: all of them become rows, and what cannot be measured stops nothing."""

import json
import os
import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import gpu_ways
import network_runs
import pytest

# At the end, where none of its modules hides one of the tests'.
import torch
from energy import Counter, Meter
from gpu_ways import GpuWays
from network_runs import run
from rows import environment
from selection import OWN_THRESHOLDS
from shown_rows import ON_A_GPU
from subjects import Network
from summary import show
from workloads import COMPACT_ON_GPU, Workload

from eefast.engines.host_reads import HostReadPolicy, Times
from eefast.measure.time_costs import TimeCosts

SHAPE = (1, 12, 12)
TINY = Network("eenet20", (3, 12, 12), 10, (0.0, 0.0, 1.0))
ALL = Workload(TINY, 4, (0.5,), compile_seconds=1, stage_seconds=1, traced=True)


def test_a_gpu_run_from_the_network_to_the_rows(on_cpu, monkeypatch):
    asked = []

    def in_time(net, images, dtype, clock):
        asked.append((len(images), dtype))
        return TimeCosts("PyTorch", len(images), (0.5, 0.75, 1.0))

    monkeypatch.setattr(network_runs.time_costs, "measured", in_time)
    run([ALL, replace(ALL, costs=(1.0,), traced=False)], environment("cpu"), 1e9, GpuWays())
    written = on_cpu()
    assert not [row["note"] for row in written if row["note"]]
    early = {row["provider"]: row for row in written if row["setting"] == "cost 0.5"}
    ways = {"plain, eager", "plain, torch.compile", "plain, eager, CUDA graph", "plain, torch.compile, CUDA graph"}
    ways |= {"masked, PyTorch", "eefast compact", "eefast compact, streaming", "eefast compact, without graphs"}
    ways |= {"eefast resident", "eefast resident, streaming", "torch.compile per stage"}
    assert set(early) == ways | {"BatchCond, padding", "BatchCond, splitting", "BatchCond, table"}
    assert asked == [(4, torch.float32)], "once for the network and batch size, none where no image exits early"
    for name, row in early.items():
        assert row["checked"]
        assert row["time_cost"] == pytest.approx(
            sum(n * c for n, c in zip(row["exits"], (0.5, 0.75, 1.0), strict=True)) / 12
        )
        assert row["time_way"] == "PyTorch"
        assert row["images_per_s"][1] > 0
        assert row["setup_seconds"] > 0
        assert sum(row["exits"]) == 12
        assert row["exits"] == ([0, 0, 12] if name.startswith("plain") else early["masked, PyTorch"]["exits"])
        assert row["mean_cost"] == (1 if name.startswith("plain") else pytest.approx(0.5, abs=0.1))
    assert sum(early["masked, PyTorch"]["mix"]) == pytest.approx(1)
    none = [row for row in written if row["setting"] == "no exits"]
    assert {(row["mean_cost"], row["time_cost"]) for row in none} == {(1.0, None)}

    waits = {name: row["host_waits"] for name, row in early.items()}
    assert all(waits[name] == 0 for name in ways if name.startswith("plain"))
    assert waits["BatchCond, padding"] == 0
    assert 0 < waits["BatchCond, splitting"] == waits["torch.compile per stage"] <= 2 < waits["masked, PyTorch"]

    # Traced rows come once more, at the end; the newest is shown.
    again = [row for row in written if row["launch_gaps"] is not None]
    assert written[-len(again) :] == again
    assert {row["provider"] for row in again} == set(early)
    assert all(0.9 < row["launch_gaps"] < 1 for row in again)
    text = show([{**row, "environment": {**row["environment"], **ON_A_GPU}} for row in written])
    assert text.count("BatchCond, padding") == 2
    assert re.search(r"BatchCond, padding +\| +\S+ +\| +\S+( +\| +0\.\d+){2} +\| +0 +\| +100%", text)


def test_times_of_stages_are_kept_where_output_goes(monkeypatch, tmp_path):
    times = Times((1, 2), ((0.5, 0.75),) * 2, (None, None), 1e-5, 1e-6, (0.25,))
    graphs = SimpleNamespace(policies=[HostReadPolicy(times)])
    fast = SimpleNamespace(engine=SimpleNamespace(graphs=graphs))
    way = gpu_ways.GpuWay("eefast compact", False, lambda: gpu_ways.Made(list, fast), torch.float16)
    monkeypatch.delenv("OUT", raising=False)
    gpu_ways.keep_stage_times(ALL, way)
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu_ways.keep_stage_times(ALL, replace(way, make=lambda: gpu_ways.Made(list)))
    assert not list(tmp_path.iterdir())
    gpu_ways.keep_stage_times(ALL, way)
    (line,) = (tmp_path / "stage-times.ndjson").read_text().splitlines()
    found = json.loads(line)
    assert found["sizes"] == [1, 2]
    assert found["stages"] == [[0.5, 0.75]] * 2
    assert (found["network"], found["batch_size"], found["way"]) == ("eenet20", 4, "eefast compact")


def test_memory_of_all_ways_and_energy_of_those_that_decide(on_cpu, monkeypatch):
    asked = []

    def joules():
        asked.append(len(asked))
        return 6.0 * len(asked)

    monkeypatch.setattr(gpu_ways, "meter", lambda device: Meter([Counter(joules)], "a test"))
    monkeypatch.setattr(gpu_ways, "METERED_SECONDS", 0.0)
    monkeypatch.setattr(gpu_ways, "peak_memory", lambda run, device: (run(), 1234))
    run([Workload(TINY, 4, (0.5,), metered=True)], environment("cpu"), 1e9, GpuWays())
    metered = {row["provider"] for row in on_cpu() if row["joules_per_image"] is not None}
    (best,) = {row["best_static"] for row in on_cpu()}
    assert metered == {best, "masked, PyTorch", "eefast compact", "eefast resident"}
    # One pass over three batches of four images for six joules.
    assert {row["joules_per_image"] for row in on_cpu()} == {0.5, None}
    assert {row["peak_memory"] for row in on_cpu()} == {1234}


def test_compiled_and_captured_once_for_all_costs(on_cpu, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **kwargs: compiled.append(kwargs) or run)
    works = [Workload(TINY, 4, (cost,), compile_seconds=1) for cost in (0.5, 1.0)]
    run(works, environment("cpu"), 1e9, GpuWays())
    assert compiled == [{"dynamic": False, "fullgraph": True}]


def test_graphs_are_switched_off_for_one_way_only(monkeypatch):
    seen = []

    def accelerate(net, engine, max_batch_size, **_):
        seen.append((engine, max_batch_size, os.environ.get("EEFAST_GRAPHS")))

    monkeypatch.setattr(gpu_ways.eefast, "accelerate", accelerate)
    monkeypatch.delenv("EEFAST_GRAPHS", raising=False)
    case = SimpleNamespace(net=None, batches=[torch.empty(0, *SHAPE)])

    def made(n):
        seen.clear()
        for way in gpu_ways.ways(Workload(TINY, n, (0.5,)), case):
            if way.name.startswith("eefast compact"):
                way.make()
        return set(seen), len(seen)

    assert made(4) == ({("compact", 4, None), ("compact", 4, "0"), ("compact", 256, None)}, 3)
    # A stream of large batches shares the graphs.
    assert made(300) == ({("compact", 300, None), ("compact", 300, "0")}, 2)


def test_wrong_answers_get_no_speed_on_a_gpu_either(on_cpu, monkeypatch):
    right = gpu_ways.batch_condition.prepare

    def wrong(net, mode, dtype, largest):
        run = right(net, mode, dtype, largest)
        if mode == "table":
            raise RuntimeError("no table")
        return run if mode == "splitting" else lambda x: run(x)._replace(logits=run(x).logits + torch.arange(10))

    monkeypatch.setattr(gpu_ways.batch_condition, "prepare", wrong)
    run([Workload(TINY, 4, (0.5,))], environment("cpu"), 1e9, GpuWays())
    found = {row["provider"]: row for row in on_cpu()}
    assert found["BatchCond, padding"]["note"].startswith("WRONG")
    assert found["BatchCond, table"]["note"] == "RuntimeError: no table"
    assert found["BatchCond, padding"]["images_per_s"] is None is found["BatchCond, table"]["images_per_s"]
    assert found["BatchCond, splitting"]["images_per_s"][1] > 0


def test_what_cannot_be_measured_stops_nothing(on_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(gpu_ways, "host_waits", lambda *_: 1 / 0)
    works = [replace(COMPACT_ON_GPU[6], compile_seconds=0, seconds=1), replace(ALL, seconds=1)]
    run([*works, replace(ALL, seconds=1e6)], environment("cpu"), 1000, GpuWays())
    first, *between, last = (row for row in on_cpu() if row["launch_gaps"] is None)
    assert first["network"] == "regnety_008"
    assert "needs timm: pip install timm" in first["note"]
    assert last["note"] == "skipped: the budget of 1000 s is spent"
    assert len(between) == 14
    assert all(row["images_per_s"] and row["host_waits"] is None for row in between)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@torch.no_grad()
def test_exits_attached_to_a_network_of_timm(on_cpu):
    network = Network("regnety_002", (3, 32, 32), 10, (0.0, 0.0, 1.0), exits=("s1", "s3"))
    device, work = GpuWays(), Workload(network, 4, (0.6,))
    pairs = {way.name: (way, case) for way, case in device.pairs(work, device.subject(work, [work]))}
    way, case = pairs["BatchCond, splitting"]
    assert float(case.net.cost @ torch.tensor(case.mix)) == pytest.approx(0.6, abs=1e-4)
    assert len(case.batches) == 3
    found, note = network_runs.answered(way, case, device)
    assert found, note


@pytest.mark.parametrize("batch_size", [31, 64])
def test_a_trained_network_keeps_its_thresholds_on_a_gpu(subject, monkeypatch, batch_size):
    monkeypatch.setattr(gpu_ways, "DEVICE", "cpu")
    net = subject.net.with_criterion("margin", [0.4, 0.3]).eval()
    network = Network("eenet20 on something", SHAPE, 10, (), real=lambda count: replace(subject, net=net))
    work = Workload(network, batch_size)
    found = gpu_ways.case_of(work, gpu_ways.subject(network, batch_size))
    assert work.setting == OWN_THRESHOLDS
    assert found.net.thresholds.tolist() == net.thresholds.tolist()
    taken = torch.cat([net(x.float()).exit_index for x in found.batches])
    assert found.mix == pytest.approx((taken.bincount(minlength=3) / len(taken)).tolist(), abs=1e-3 + 1.5 / len(taken))
    assert {len(x) for x in found.batches} == {batch_size}
