"""Cases of the ops become rows on both devices: right answers are timed, wrong ones and what cannot run say so."""

import sys
from types import SimpleNamespace

import ops
import pytest

# At the end, where none of its modules hides one of the tests'.
import rows
import torch
from op_cases import COPY, EAGER, OURS, READ, OpCase, Provider, cpu_cases, make_inputs, providers
from ops import Ceilings, Timed

CASE = OpCase("exit_head", 31)
CEILINGS = Ceilings(copy=1e9, matmul=1e12)
AROUND = {"device": "some device", "date": "2026-11-26"}


def fails(inputs):
    raise RuntimeError("no such kernel\nat all")


WRONG = Provider("wrong", lambda inputs: lambda: (inputs.positions, len(inputs.positions)))
FAILS = Provider("fails", fails)


@pytest.mark.parametrize(
    ("provider", "note"),
    [(WRONG, "WRONG: "), (FAILS, "RuntimeError: no such kernel")],
    ids=lambda v: getattr(v, "name", ""),
)
def test_what_is_wrong_or_cannot_run_is_not_timed(provider, note):
    call, said = ops.attempt(provider, make_inputs(CASE, "cpu"))
    assert call is None
    assert said.startswith(note)
    assert "\n" not in said


def test_figures_of_a_row():
    found = [
        Timed(OURS, seconds=(1e-6, 2e-6, 4e-6)),
        Timed(EAGER, seconds=(3e-6, 8e-6, 9e-6)),
        Timed(FAILS, note="why"),
    ]
    ours, eager, failed = ops.rows_of(CASE, found, 1, CEILINGS)
    assert ours.microseconds == pytest.approx((1, 2, 4))
    assert (ours.typical, ours.speedup, eager.speedup) == pytest.approx((2, 4, 1))
    assert ours.gigabytes_per_s == pytest.approx(CASE.bytes / 2e-6 / 1e9)
    assert ours.copy_share == pytest.approx(CASE.bytes / 2e-6 / 1e9)
    assert ours.bound_share == pytest.approx(max(CASE.bytes / 1e9, CASE.flops / 1e12) / 2e-6)
    assert (ours.bytes, ours.flops, ours.dtype, ours.height) == (CASE.bytes, CASE.flops, "float32", 8)
    assert (failed.checked, failed.note, failed.microseconds, failed.speedup) == (False, "why", None, None)


def test_a_timing_is_compared_with_the_same_timing():
    found = [Timed(OURS, seconds=(1.0,) * 3), Timed(OURS, "graph", (0.5,) * 3), Timed(EAGER, seconds=(3.0,) * 3)]
    assert [row.speedup for row in ops.rows_of(CASE, found, 0, CEILINGS)] == [3, None, 1]


def test_a_plain_copy_in_turn_is_the_ceiling():
    seconds = 2 * CASE.map_bytes / 2e9
    copy, ours = ops.rows_of(CASE, [Timed(COPY, seconds=(seconds,) * 3), Timed(OURS, seconds=(1.0,) * 3)], 0, CEILINGS)
    assert (copy.copy_share, copy.bytes, copy.flops) == (pytest.approx(1), 2 * CASE.map_bytes, 0)
    assert ours.copy_share == pytest.approx(CASE.bytes / 2e9)


@pytest.fixture
def written(monkeypatch, tmp_path):
    """The rows of a fresh folder."""
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    return lambda: rows.read(tmp_path.glob("*.jsonl"))


@pytest.fixture
def gpu(monkeypatch):
    """Triton's timers and a GPU's memory, here: every call takes 2 ms, in a graph 1 ms; free bytes; providers."""

    def do_bench(call, quantiles, **_):
        call()
        return [2.0 * (1 + q) for q in quantiles] if len(quantiles) > 1 else 2.0

    def do_bench_cudagraph(call, quantiles, **_):
        if call.__qualname__.startswith("never_captured"):
            raise RuntimeError("capture is not permitted")
        return [1.0] * 3

    testing = SimpleNamespace(do_bench=do_bench, do_bench_cudagraph=do_bench_cudagraph)
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    found = SimpleNamespace(free=2**40, waits=0, inputs=make_inputs)
    monkeypatch.setattr(ops, "make_inputs", lambda case, device: make_inputs(case, "cpu"))
    measure = ops.measure_ceilings
    monkeypatch.setattr(
        ops, "measure_ceilings", lambda device, dtypes, *sizes: measure("cpu", dtypes, 16, 4, sizes[-1])
    )
    monkeypatch.setattr(ops, "gpu_cases", lambda: [CASE, OpCase("compact", 31)])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (found.free, found.free))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    return found


def never_captured(inputs):
    def call():
        return EAGER.make(inputs)()

    call.__qualname__ = "never_captured"
    return call


def test_a_run_on_a_gpu(gpu, written, monkeypatch):
    others = (WRONG, EAGER, Provider("never captured", never_captured))
    monkeypatch.setattr(ops, "providers", lambda case: (OURS, *others) if case == CASE else providers(case))
    ops.bench_gpu("", 100, AROUND)
    ceilings, found = written()[:2], written()[2:]
    assert [(row["ceiling"], row["dtype"]) for row in ceilings] == [("copy", "uint8"), ("matmul", "float32")]
    heads = {(row["provider"], row["timing"]): row for row in found if row["op"] == "exit_head"}
    assert set(heads) == {
        *(("eefast", "launch"), ("eefast", "graph"), ("wrong", "launch"), ("eager", "launch")),
        *(("never captured", "launch"), ("never captured", "graph")),
    }
    # The median counts on a GPU.
    assert heads["eefast", "launch"]["microseconds"] == pytest.approx([2400, 3000, 3600])
    assert (heads["eefast", "launch"]["typical"], heads["eefast", "graph"]["typical"]) == pytest.approx((3000, 1000))
    assert (heads["eefast", "launch"]["speedup"], heads["eefast", "graph"]["speedup"]) == (1, None)
    assert heads["wrong", "launch"]["note"].startswith("WRONG")
    assert heads["never captured", "graph"]["note"] == "RuntimeError: capture is not permitted"
    assert heads["never captured", "launch"]["checked"]
    gathers = {(row["provider"], row["timing"]) for row in found if row["op"] == "compact"}
    assert {("eefast", "graph"), ("x[mask]", "launch"), ("nonzero_static", "graph")} <= gathers
    assert ("x[mask]", "graph") not in gathers, "it waits for the host"


@pytest.mark.parametrize(
    ("free", "budget", "note"),
    [(2**40, -1, "skipped: the budget of -1 s is spent"), (0, 100, "skipped: needs about 1.0 GiB, 0.0 GiB are free")],
    ids=["no time", "no memory"],
)
def test_what_does_not_fit_a_gpu_is_a_row(gpu, written, free, budget, note):
    gpu.free = free
    ops.bench_gpu("exit_head", budget, AROUND)
    found = [row for row in written() if "op" in row]
    assert {(row["provider"], row["note"]) for row in found} == {("eefast", note), ("eager", note)}


def test_a_lost_gpu_ends_the_run(gpu, written, monkeypatch):
    monkeypatch.setattr(ops, "providers", lambda case: (FAILS,))

    def lost():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit, match=r"no use to this process after exit_head-31x64.*no such kernel"):
        ops.bench_gpu("", 100, AROUND)


@pytest.mark.parametrize(
    ("case", "name"),
    [(CASE, READ.name), (OpCase("exit_head", 4096), COPY.name), (OpCase("exit_conv_head", 31), None)],
    ids=["in a cache", "larger than caches", "convolution"],
)
def test_what_takes_its_turns_beside_the_ways_on_a_cpu(case, name):
    assert [provider.name for provider in ops.cpu_providers(case)[len(providers(case)) :]] == ([name] if name else [])


def test_providers_take_turns_on_a_cpu():
    case = cpu_cases()[0]
    turns = [provider for planned, turn, provider in ops.PLAN if planned == case]
    assert turns == [*ops.cpu_providers(case)] * ops.TURNS


def test_rows_of_turns_on_a_cpu(monkeypatch):
    monkeypatch.setattr(ops, "cpu_attempt", lambda case, provider: (None, "why"))
    other = OpCase("compact", 31)
    turns = [0.2e-6, 0.1e-6, 0.3e-6, 0.5e-6, 0.4e-6, 0.6e-6]
    spans = {(CASE, OURS): turns, (CASE, FAILS): [], (other, OURS): turns, (CASE, EAGER): [3 * s for s in turns]}
    found = {(row.op, row.provider): row for row in ops.rows_of_turns(spans, CEILINGS)}
    assert len(found) == 4
    ours = found["exit_head", "eefast"]
    # The lower quantile counts on a CPU.
    assert ours.microseconds == pytest.approx((0.2, 0.35, 0.5))
    assert (ours.typical, ours.speedup, ours.timing) == (pytest.approx(0.2), pytest.approx(3), "launch")
    assert (found["exit_head", "fails"].note, found["exit_head", "fails"].checked) == ("why", False)
    assert found["compact", "eefast"].speedup is None
