"""The bench of whole networks: thresholds give the cost asked for, and only right answers get a speed."""

import json
import os
import re
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import cpu_runs
import gpu_runs
import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import runtime_process
import torch
from energy import Counter, Meter
from gpu_runs import GpuWork
from networks import images, lived_in
from peers import EAGER, PEERS, Peer
from rows import NetworkRow, environment
from selection import OWN_THRESHOLDS
from subjects import Network, Subject, check, mix_of_cost, thresholds
from summary import show
from targets import TARGETS

from eefast import criteria, zoo
from eefast.thresholds.outputs import collect, exits_taken

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def subject():
    net = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5)
    x = images(64, SHAPE)
    outputs, _ = collect(net, [(x, torch.zeros(len(x)))])
    return Subject(net, x, outputs)


@pytest.mark.parametrize("criterion", list(criteria.CRITERIA))
@pytest.mark.parametrize("wanted", [0.5, 0.3, 0.2])
def test_thresholds_give_the_cost_asked_for(subject, wanted, criterion):
    cost = subject.net.cost
    mix = mix_of_cost(cost.tolist(), wanted)
    assert sum(mix) == pytest.approx(1)
    taken = exits_taken(subject.outputs, criteria.get(criterion), thresholds(subject.outputs, mix, criterion))
    assert float(cost[taken].mean()) == pytest.approx(wanted, abs=1.5 / len(taken))


def test_cost_goes_from_the_first_exit_to_none(subject):
    cost = subject.net.cost.tolist()
    assert mix_of_cost(cost, 1) == (0, 0, 1)
    assert mix_of_cost(cost, 0.5 * cost[0]) == pytest.approx((1, 0, 0))
    for name, criterion in criteria.CRITERIA.items():
        never = thresholds(subject.outputs, (0, 0, 1), name)
        assert exits_taken(subject.outputs, criterion, never).tolist() == [2] * 64


@pytest.mark.parametrize("criterion", list(criteria.CRITERIA))
def test_what_is_called_no_exits_has_none(subject, criterion):
    net = subject.net.with_criterion(criterion)
    case = cpu_runs.make_case(replace(subject, net=net), 16, 1.0)
    taken = exits_taken(case.prepared.outputs, case.prepared.net.criterion, case.setting.thresholds)
    assert (case.name, taken.unique().tolist()) == ("no exits", [2])


def wrong_logits(net):
    plain = EAGER.prepare(net)
    return lambda x: plain(x) + torch.arange(net.num_classes)


def wrong_exits(net):
    def run(x):
        result = net(x)
        return result._replace(exit_index=(result.exit_index + 1) % 3)

    return run


def ends(net):
    os._exit(7)


def test_only_right_answers_get_a_speed(subject, monkeypatch):
    monkeypatch.setattr(cpu_runs, "ROUNDS", 2)
    monkeypatch.setattr(cpu_runs, "TURN_SECONDS", 0.001)
    right = replace(EAGER, name="right", family="here")
    peers = (
        right,
        replace(right, name="wrong logits", prepare=wrong_logits),
        Peer("wrong exits", wrong_exits, str, False, "here"),
        replace(right, name="missing", needs=("a_package_that_is_missing",)),
        replace(right, name="ends", prepare=ends, family="elsewhere"),
    )
    work = cpu_runs.CpuWork(Network("eenet20", SHAPE, 10, ()), 8, (0.3,))
    with cpu_runs.started(peers) as workers, cpu_runs.saved(subject) as folder:
        cpu_runs.open_everywhere(workers, folder)
        rows = {row.provider: row for row in cpu_runs.measure(work, subject, workers, peers)}
    assert rows["right"].images_per_s[1] > 0
    assert rows["right"].realised_ratio == pytest.approx(1)
    assert rows["right"].best_static == "right"
    assert rows["right"].exits == (0, 0, 64)
    assert rows["missing"].note == "not installed: pip install 'eefast[bench]'"
    assert rows["ends"].note == "its process has ended, exit code 7"
    for name, what in (("wrong logits", "logits of one are off"), ("wrong exits", "images took another exit")):
        assert rows[name].note.startswith("WRONG")
        assert what in rows[name].note
    for name in set(rows) - {"right"}:
        assert rows[name].images_per_s is None

    text = show([json.loads(json.dumps({**asdict(row), "environment": environment("cpu")})) for row in rows.values()])
    assert "! WRONG" in text
    assert "not measured: resident: realised ratio ≥ 2.2" in text


def ready(peer):
    reason = f"needs {' and '.join(peer.needs)}: pip install 'eefast[bench]'"
    return pytest.param(
        peer, id=peer.name, marks=pytest.mark.skipif(not all(map(find_spec, peer.needs)), reason=reason)
    )


# torch.compile takes longer than all the others; those with variables need separate processes.
@pytest.mark.parametrize("peer", [ready(p) for p in PEERS if p.family != "torch.compile" and not p.variables])
@torch.no_grad()
def test_a_peer_agrees_with_the_reference(subject, peer):
    for cost in (1,) if peer.static else (1, 0.5, 0.25):
        prepared = cpu_runs.make_case(subject, 16, cost).prepared
        try:
            run = peer.prepare(prepared.net)
        except ValueError as error:
            if "AVX512-BF16" not in str(error) and "C++ kernels are" not in str(error):
                raise
            pytest.skip(str(error))  # what this machine lacks, in the engine's words
        batches = [x.contiguous(memory_format=peer.memory_format) for x in prepared.batches]
        found = [run(x) for x in batches]
        if peer.static:
            logits, taken = torch.cat(found), torch.full((64,), 2)
        else:
            logits, taken = (torch.cat([getattr(r, name) for r in found]) for name in ("logits", "exit_index"))
        checked, note = check(prepared, peer.static, logits, taken, peer.dtype)
        assert checked, note
        if not peer.static:
            prepared.net.thresholds.fill_(-1)
            assert run(batches[0]).exit_index.tolist() == [0] * 16, "it must follow thresholds that change"
    assert peer.describe()


TINY = Network("eenet20", (3, 12, 12), 10, (0.0, 0.0, 1.0))
ALL = GpuWork(TINY, 4, 0.5, compile_seconds=1, stage_seconds=1, traced=True)
ON_A_GPU = {"device": "some GPU", "cuda": "13.0", "date": "2026-11-26"}


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The ways of a GPU, run here: nothing to wait for, no graphs, nothing compiled; rows go to a fresh folder."""
    monkeypatch.setattr(gpu_runs, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_runs, "DTYPE", torch.float32)
    for name, value in {"ROUNDS": 2, "ROUND_SECONDS": 0.0, "MOST_BATCHES": 3, "CALIBRATED": 64}.items():
        monkeypatch.setattr(gpu_runs, name, value)
    monkeypatch.setattr(gpu_runs, "captured", lambda call, x: call)
    monkeypatch.setattr(gpu_runs, "busy_seconds", lambda run: run() and 1e-6)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    gpu_runs.subject.cache_clear()
    gpu_runs.plain.cache_clear()
    yield lambda: rows.read(tmp_path.glob("*.jsonl"))
    gpu_runs.subject.cache_clear()
    gpu_runs.plain.cache_clear()


def test_a_gpu_run_from_the_network_to_the_rows(on_cpu):
    gpu_runs.run([ALL, replace(ALL, cost=1.0, traced=False)], environment("cpu"), 1e9)
    written = on_cpu()
    assert not [row["note"] for row in written if row["note"]]
    early = {row["provider"]: row for row in written if row["setting"] == "cost 0.5"}
    ways = {"plain, eager", "plain, torch.compile", "plain, eager, CUDA graph", "plain, torch.compile, CUDA graph"}
    ways |= {"masked, PyTorch", "eefast compact", "eefast compact, streaming", "eefast compact, without graphs"}
    ways |= {"eefast resident", "eefast resident, streaming", "torch.compile per stage"}
    assert set(early) == ways | {"BatchCond, padding", "BatchCond, splitting", "BatchCond, table"}
    for name, row in early.items():
        assert row["checked"]
        assert row["images_per_s"][1] > 0
        assert row["setup_seconds"] > 0
        assert sum(row["exits"]) == 12
        assert row["exits"] == ([0, 0, 12] if name.startswith("plain") else early["masked, PyTorch"]["exits"])
        assert row["mean_cost"] == (1 if name.startswith("plain") else pytest.approx(0.5, abs=0.1))
    assert sum(early["masked, PyTorch"]["mix"]) == pytest.approx(1)
    assert {row["mean_cost"] for row in written if row["setting"] == "no exits"} == {1.0}

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
    assert re.search(r"BatchCond, padding +\| +\S+ +\| +\S+ +\| +0\.\d+ +\| +0 +\| +100%", text)


def test_memory_of_all_ways_and_energy_of_those_that_decide(on_cpu, monkeypatch):
    asked = []

    def joules():
        asked.append(len(asked))
        return 6.0 * len(asked)

    monkeypatch.setattr(gpu_runs, "meter", lambda device: Meter([Counter(joules)], "a test"))
    monkeypatch.setattr(gpu_runs, "METERED_SECONDS", 0.0)
    monkeypatch.setattr(gpu_runs, "peak_memory", lambda run, device: (run(), 1234))
    gpu_runs.run([GpuWork(TINY, 4, 0.5, metered=True)], environment("cpu"), 1e9)
    metered = {row["provider"] for row in on_cpu() if row["joules_per_image"] is not None}
    (best,) = {row["best_static"] for row in on_cpu()}
    assert metered == {best, "masked, PyTorch", "eefast compact", "eefast resident"}
    # One pass over three batches of four images for six joules.
    assert {row["joules_per_image"] for row in on_cpu()} == {0.5, None}
    assert {row["peak_memory"] for row in on_cpu()} == {1234}


def test_energy_and_memory_on_a_cpu(subject, monkeypatch):
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None)
    monkeypatch.setattr(cpu_runs, "time", clock)
    # Ten watts.
    monkeypatch.setattr(cpu_runs, "meter", lambda device: Meter([Counter(lambda: 10 * now[0])], "a test"))

    def seconds(*_):
        # To get going, then three passes of what takes 0.2 s.
        now[0] += 0.1 + 3 * 0.2
        return 0.2

    seen = {"exits": None, "setup_seconds": 1.0, "details": "", "peak_memory": 1234}
    answer = SimpleNamespace(logits=subject.outputs[-1].logits, **seen)
    workers = {"torch": SimpleNamespace(ends=0, answer=lambda *_: answer, seconds=seconds)}
    work = cpu_runs.CpuWork(Network("eenet20", SHAPE, 10, ()), 8, (1.0,))
    (row,) = cpu_runs.measure(work, subject, workers, (EAGER,))
    assert not row.note
    # 32 images in 0.2 s.
    assert row.joules_per_image == pytest.approx(10 * 0.2 / 32)
    assert row.peak_memory == 1234


def test_a_process_tells_its_peak_memory(subject, tmp_path, monkeypatch):
    runtime_process.save(tmp_path, subject.net, subject.images)
    process = runtime_process.Server({EAGER.name: EAGER})
    process.open(str(tmp_path))
    monkeypatch.setattr(runtime_process, "peak_memory", lambda run, device: (run(), {"cpu": 1234}[device]))
    answer = process.answer(EAGER.name, runtime_process.Setting((0.5, 0.5), 16, 4))
    assert answer.peak_memory == 1234
    torch.testing.assert_close(answer.logits, subject.outputs[-1].logits, rtol=1e-4, atol=1e-4)


def test_compiled_and_captured_once_for_all_costs(on_cpu, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **kwargs: compiled.append(kwargs) or run)
    works = [GpuWork(TINY, 4, cost, compile_seconds=1) for cost in (0.5, 1.0)]
    gpu_runs.run(works, environment("cpu"), 1e9)
    assert compiled == [{"dynamic": False, "fullgraph": True}]


def test_graphs_are_switched_off_for_one_way_only(monkeypatch):
    seen = []

    def accelerate(net, engine, max_batch_size, **_):
        seen.append((engine, max_batch_size, os.environ.get("EEFAST_GRAPHS")))

    monkeypatch.setattr(gpu_runs.eefast, "accelerate", accelerate)
    monkeypatch.delenv("EEFAST_GRAPHS", raising=False)
    prepared = SimpleNamespace(net=None, batches=[torch.empty(0, *SHAPE)])

    def made(n):
        seen.clear()
        for (name, _), make in gpu_runs.makers(GpuWork(TINY, n, 0.5), prepared).items():
            if name.startswith("eefast compact"):
                make()
        return set(seen), len(seen)

    assert made(4) == ({("compact", 4, None), ("compact", 4, "0"), ("compact", 256, None)}, 3)
    # A stream of large batches shares the graphs.
    assert made(300) == ({("compact", 300, None), ("compact", 300, "0")}, 2)


def test_wrong_answers_get_no_speed_on_a_gpu_either(on_cpu, monkeypatch):
    right = gpu_runs.batch_condition.prepare

    def wrong(net, mode, dtype, largest):
        run = right(net, mode, dtype, largest)
        if mode == "table":
            raise RuntimeError("no table")
        return run if mode == "splitting" else lambda x: run(x)._replace(logits=run(x).logits + torch.arange(10))

    monkeypatch.setattr(gpu_runs.batch_condition, "prepare", wrong)
    gpu_runs.run([GpuWork(TINY, 4, 0.5)], environment("cpu"), 1e9)
    found = {row["provider"]: row for row in on_cpu()}
    assert found["BatchCond, padding"]["note"].startswith("WRONG")
    assert found["BatchCond, table"]["note"] == "RuntimeError: no table"
    assert found["BatchCond, padding"]["images_per_s"] is None is found["BatchCond, table"]["images_per_s"]
    assert found["BatchCond, splitting"]["images_per_s"][1] > 0


def test_what_cannot_be_measured_stops_nothing(on_cpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr(gpu_runs, "host_waits", lambda *_: 1 / 0)
    works = [replace(gpu_runs.COMPACT_WORK[6], compile_seconds=0, seconds=1), replace(ALL, seconds=1)]
    gpu_runs.run([*works, replace(ALL, seconds=1e6)], environment("cpu"), 1000)
    first, *between, last = (row for row in on_cpu() if row["launch_gaps"] is None)
    assert first["network"] == "regnety_008"
    assert "not installed: pip install timm" in first["note"]
    assert last["note"] == "skipped: the budget of 1000 s is spent"
    assert len(between) == 14
    assert all(row["images_per_s"] and row["host_waits"] is None for row in between)


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
@torch.no_grad()
def test_exits_attached_to_a_network_of_timm(on_cpu):
    network = Network("regnety_002", (3, 32, 32), 10, (0.0, 0.0, 1.0), exits=("s1", "s3"))
    prepared, mix = gpu_runs.prepare(GpuWork(network, 4, 0.6))
    assert float(prepared.net.cost @ torch.tensor(mix)) == pytest.approx(0.6, abs=1e-4)
    assert len(prepared.batches) == 3
    found = gpu_runs.batch_condition.prepare(prepared.net, "splitting", torch.float32, 4)
    way, note = gpu_runs.checked(prepared, "splitting", False, lambda: gpu_runs.one_by_one(found))
    assert way, note


def test_key_figures_come_first_and_fit_into_their_phase():
    targets = [t for t in TARGETS if t.gpu]
    key = gpu_runs.COMPACT_WORK[: len(targets)]
    for work, target in zip(key, targets, strict=True):
        row = {"network": work.network.name, "batch_size": work.batch_size, "setting": work.setting}
        assert target.concerns({**row, "provider": target.provider})
        assert work.compile_seconds
        assert work.traced
    script = Path(gpu_runs.__file__).with_name("gpu.sh").read_text()
    (seconds,) = map(int, re.findall(r"--engine compact --seconds (\d+)", script))
    (limit,) = map(int, re.findall(r"\[compact\]=(\d+)", script))
    assert sum(work.guess for work in key) + gpu_runs.TRACE_SECONDS <= seconds
    assert seconds + 20 <= limit <= 150, "Python, PyTorch and the last work need some more"
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", script))
    total = sum(int(limits[phase]) for phase in re.search(r'PHASES="([^"]+)"', script)[1].split())
    assert f"all phases, {total} s at most" in script


def test_all_sizes_and_costs_are_on_the_list():
    asked = {(w.network.name, w.batch_size, w.cost) for w in gpu_runs.COMPACT_WORK}
    for name, sizes in (("eenet50", (1, 8, 32, 128, 256)), ("eenet18", (1, 8, 32, 128, 256, 1024))):
        assert {(name, n, cost) for n in sizes for cost in (1.0, 0.4, 0.3)} <= asked
    assert "regnety_008" in {name for name, *_ in asked}


def row_of(provider, speed, **fields):
    row = NetworkRow("eenet50", provider, 256, "float16", (0.5, 0.5), True, images_per_s=(speed,) * 3, mean_cost=0.4)
    return replace(row, setting="cost 0.4", **fields)


def shown(*found):
    return show([{**asdict(row), "environment": ON_A_GPU} for row in found])


def test_targets_of_the_gpu():
    compiled = replace(row_of("plain, torch.compile", 1000.0), mean_cost=1.0)
    text = "compact: eenet50 at 224, N = 256, cost .4: realised ratio ≥ 0.95"
    assert f"NOT REACHED: {text}" in shown(compiled, row_of("eefast compact", 2370.0))
    assert f"reached: {text}" in shown(compiled, row_of("eefast compact", 2380.0))
    graph = replace(compiled, provider="plain, torch.compile, CUDA graph", images_per_s=(1100.0,) * 3)
    assert f"NOT REACHED: {text}" in shown(compiled, graph, row_of("eefast compact", 2380.0))
    found = shown(row_of("plain, eager", 1000.0), row_of("eefast compact", 2380.0))
    assert f"not measured: {text}" in found
    assert "resident: realised ratio" not in found, "those are the CPU's targets"


def test_rows_come_back_and_old_ones_still_read(tmp_path):
    row = row_of("eefast compact", 2000.0, host_waits=2, launch_gaps=0.125, peak_memory=7, joules_per_image=0.5)
    back = json.loads(json.dumps(asdict(row)))
    assert NetworkRow(**{name: tuple(v) if isinstance(v, list) else v for name, v in back.items()}) == row
    assert re.search(r"eefast compact +\| +2,000 +\| +\| +0\.400 +\| +2 +\| +12%", shown(row))
    del back["host_waits"], back["launch_gaps"], back["peak_memory"], back["joules_per_image"]
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**back, "environment": ON_A_GPU}))
    old = show(rows.read([file]))
    assert re.search(r"eefast compact +\| +2,000 +\| +\| +0\.400 [ |]+$", old, re.MULTILINE)
    assert NetworkRow(**back).host_waits is NetworkRow(**back).joules_per_image is None


@pytest.mark.parametrize("batch_size", [31, 64])
def test_a_trained_network_keeps_its_thresholds_on_a_gpu(subject, monkeypatch, batch_size):
    monkeypatch.setattr(gpu_runs, "DEVICE", "cpu")
    net = subject.net.with_criterion("margin", [0.4, 0.3]).eval()
    network = Network("eenet20 on something", SHAPE, 10, (), real=lambda count: replace(subject, net=net))
    work = GpuWork(network, batch_size)
    found, mix = gpu_runs.prepare(work)
    assert work.setting == OWN_THRESHOLDS
    assert found.net.thresholds.tolist() == net.thresholds.tolist()
    taken = torch.cat([net(x.float()).exit_index for x in found.batches])
    assert mix == pytest.approx((taken.bincount(minlength=3) / len(taken)).tolist(), abs=1e-3 + 1.5 / len(taken))
    assert {len(x) for x in found.batches} == {batch_size}
