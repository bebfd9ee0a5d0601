"""Which library runs a stage: what is tried, what is left out and why, what is measured, what is asked for by name."""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Stage, assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from runtime_stages import INSTALLED, Fake, FakeStage, in_a_library, stage
from torch import Tensor, nn

import eefast
from eefast import zoo
from eefast.heads import ExitHead
from eefast.planning import planner, probe, stage_runtimes
from eefast.planning.errors import SlowerError
from eefast.planning.folding import fold_stage
from eefast.planning.inference_copies import inference_copy
from eefast.planning.stage_runtimes import LIBRARIES, Chosen, chosen, fastest_chunk, missing_runtimes
from eefast.qdq import round_nothing
from eefast.runtimes import RUNTIMES

SHAPE = (3, 10, 14)
NAN = float("nan")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known; a fake's stage takes the time that it says, all others take a second for each image."""
    monkeypatch.setattr(stage_runtimes, "choices", {})
    monkeypatch.setattr(stage_runtimes, "times", {})
    monkeypatch.setattr(stage_runtimes, "hung", {})

    def seconds(runs: Any, *rounds: float) -> list[float]:
        return [1.0 if rounds else seconds_of(*run.args) for run in runs]

    def seconds_of(candidate: nn.Module, *batches: Tensor) -> float:
        fake = isinstance(candidate, FakeStage)
        return sum(map(len, batches)) * (candidate.fake.seconds if fake else 1.0)

    monkeypatch.setattr(probe, "seconds_on_cpu", seconds)
    monkeypatch.setattr("runtime_stages.time.sleep", lambda seconds: None)


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Any:
    def only(**fakes: Fake) -> None:
        for name in list(RUNTIMES):
            monkeypatch.delitem(RUNTIMES, name)
        for name, fake in fakes.items():
            monkeypatch.setitem(RUNTIMES, name, fake)

    return only


def choose(asked: str = "auto", kind: str = "residual") -> Chosen:
    made = stage(kind)
    folded, note = fold_stage(made, torch.float32)
    return chosen(made, Chosen(folded, note), images(2, SHAPE), torch.channels_last, asked, False)


def test_the_fastest_runs_and_the_note_says_by_how_much(offer: Any) -> None:
    offer(one=Fake(name="One", seconds=0.5), two=Fake(name="Two", seconds=0.25))
    found = choose()
    assert found.note == "Two (PyTorch takes 4.00×, One takes 2.00×)"
    assert isinstance(found.stage, FakeStage)


@pytest.mark.parametrize(("seconds", "name"), [(0.2, "One"), (0.18, "Two")])
def test_the_library_of_the_stage_before_is_left_for_a_clear_gain(offer: Any, seconds: float, name: str) -> None:
    offer(one=Fake(name="One", seconds=0.25), two=Fake(name="Two", seconds=seconds))
    made = stage("residual")
    folded, note = fold_stage(made, torch.float32)
    before = FakeStage(Fake(), made)
    before.library = "One"
    given = Chosen(folded, note), images(2, SHAPE), torch.channels_last, "auto", False
    for _ in range(2):
        assert chosen(made, *given, before=before).note.startswith(name)
        assert chosen(made, *given).note.startswith("Two")


@pytest.mark.parametrize(
    ("threads", "seconds", "note"),
    [(1, 0.96, "Fake"), (1, 0.98, "folded"), (1, 1.5, "folded"), (2, 1.04, "Fake"), (2, 1.06, "folded")],
)
def test_pytorch_stays_where_another_library_gains_too_little(
    offer: Any, threads: int, seconds: float, note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    offer(fake=Fake(seconds=seconds))
    assert choose().note.startswith(note)


def raises() -> None:
    raise OSError("no such operator: Wobble")


LEFT_OUT: dict[str, tuple[Fake, str]] = {
    "raises while it is built": (Fake(build=raises), "OSError: no such operator: Wobble"),
    "raises in a call": (Fake(lambda stage, x: raises()), "OSError: no such operator: Wobble"),
    "NaN": (Fake(lambda stage, x: stage(x) * torch.nan), "its answers differ by nan of the largest"),
    "another shape": (Fake(lambda stage, x: stage(x)[:, 1:]), r"its shape [1, 3, 5, 7] instead of [1, 4, 5, 7]"),
    "no tensor": (Fake(lambda stage, x: None), "AttributeError: 'NoneType' object has no attribute 'double'"),
    "inexact": (Fake(lambda stage, x: stage(x) * 1.001), "its answers differ by 0.001 of the largest"),
    "wrong for several images": (Fake(lambda stage, x: stage(x[:1]).expand(len(x), -1, -1, -1)), "its answers differ"),
}


@pytest.mark.parametrize(("fake", "reason"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_cannot_run_the_stage_is_left_out_with_its_reason(offer: Any, fake: Fake, reason: str) -> None:
    offer(bad=fake, good=Fake(name="Good", seconds=0.5))
    found = choose()
    assert found.note.startswith(f"Good (PyTorch takes 2.00×); Fake left out: {reason}")
    with pytest.raises(ValueError, match="stages='bad' cannot run: ") as refusal:
        choose("bad")
    assert reason in str(refusal.value)
    assert str(refusal.value).endswith("; use stages='pytorch' or 'auto'")


def test_what_hangs_is_left_out_and_not_waited_for_again(offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_runtimes, "SECONDS", 0.05)
    ends = threading.Event()
    offer(hangs=Fake(build=lambda: ends.wait(60)))
    try:
        assert choose().note == "folded; Fake left out: it did not end within 0.05 s"
        monkeypatch.setattr(stage_runtimes, "SECONDS", 60.0)
        assert choose(kind="dense").note == "folded; Fake left out: it did not end within 0.05 s"
    finally:
        ends.set()


def test_what_is_not_installed_is_named_once_and_not_tried(offer: Any) -> None:
    absent = Fake(absent="fake not installed: pip install fake")
    offer(absent=absent, slow=Fake(quick=False, absent="as well"))
    assert missing_runtimes() == ["Fake left out: fake not installed: pip install fake"]
    assert choose().note == "folded"
    with pytest.raises(ValueError, match="stages='absent' cannot run: fake not installed: pip install fake; use"):
        choose("absent")
    assert absent.built == 0


def test_by_name_it_runs_however_slow_it_is(offer: Any) -> None:
    slow = Fake(quick=False, seconds=7)
    offer(slow=slow)
    assert choose().note == "folded"
    assert slow.built == 0
    found = choose("slow")
    assert isinstance(found.stage, FakeStage)
    assert found.note == "Fake"
    assert choose("pytorch").note == "folded"


def test_a_stage_is_measured_once_and_built_again(offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = Fake(name="Fast", seconds=0.5), Fake(name="Slow", seconds=0.7)
    offer(fast=fast, slow=slow)
    first = choose()
    monkeypatch.setattr(probe, "seconds_on_cpu", lambda runs: pytest.fail("it was measured before"))
    again = choose()
    assert (again.note, again.chunk) == (first.note, first.chunk)
    assert again.stage is not first.stage
    assert (fast.built, slow.built) == (2, 1)
    fast.before = raises
    assert choose().note == "Fast left out: OSError: no such operator: Wobble"
    with pytest.raises(pytest.fail.Exception, match="measured before"):
        choose(kind="dense")


def test_what_is_slow_for_single_images_is_not_measured_further(offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(fast=Fake(name="Fast", seconds=1.1), slow=Fake(name="Slow", seconds=1.3))
    timed, sizes = probe.seconds_on_cpu, []

    def noted(runs: Any) -> list[float]:
        sizes.append([[len(batch) for batch in run.args[1:]] for run in runs])
        return timed(runs)

    monkeypatch.setattr(probe, "seconds_on_cpu", noted)
    assert choose().note == "folded (Fast takes 1.10×, Slow takes 1.30×)"
    assert sizes == [[[1]] * 3, [[6, 4]] * 2, [[64, 43]] * 2]


def test_copies_for_a_library_wake_no_threads_that_spin_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    folded, _ = fold_stage(stage("residual"), torch.float32)
    folded.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    features = images(2, SHAPE).contiguous(memory_format=torch.channels_last)
    library = in_a_library(folded, features)
    seen.clear()
    contiguous = Tensor.contiguous
    monkeypatch.setattr(
        Tensor, "contiguous", lambda x, **how: (seen.append(torch.get_num_threads()), contiguous(x, **how))[1]
    )
    torch.set_num_threads(3)
    try:
        stage_runtimes._run(library, features)
        assert set(seen) == {1}
        seen.clear()
        stage_runtimes._run(folded, features)
        assert set(seen) == {3}
    finally:
        torch.set_num_threads(before)


def test_libraries_alone_leave_pytorch_out_where_one_of_them_can(offer: Any) -> None:
    offer(slow=Fake(name="Slow", seconds=3.0), slower=Fake(name="Slower", seconds=3.3))
    found = choose(LIBRARIES)
    assert isinstance(found.stage, FakeStage)
    assert found.note == "Slow (Slower takes 1.10×)"
    offer(broken=Fake(name="Broken", build=raises))
    found = choose(LIBRARIES)
    assert not isinstance(found.stage, FakeStage)
    assert found.note == "folded; Broken left out: OSError: no such operator: Wobble"


def test_the_time_is_told_before_chunks_are_measured(offer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(fast=Fake(name="Fast", seconds=0.25))
    monkeypatch.setattr(stage_runtimes, "fastest_chunk", lambda *_: pytest.fail("measured"))
    folded, note = fold_stage(stage("dense"), torch.float32)
    told: list[float] = []

    def spend(seconds: float) -> None:
        told.append(seconds)
        raise SlowerError("too slow")

    for _ in range(2):
        with pytest.raises(SlowerError, match="too slow"):
            chosen(stage("dense"), Chosen(folded, note), images(2, SHAPE), torch.channels_last, "auto", True, spend)
    assert told == [0.25, 0.25]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_features_come_in_the_layout_that_a_library_reads(offer: Any, layout: torch.memory_format) -> None:
    offer(fake=Fake(seconds=0.5, layout=layout))
    assert isinstance(choose().stage, FakeStage)  # which asserts on every call


def identity(seconds: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Any]:
    asked: list[int] = []

    def timed(runs: Any) -> list[float]:
        (run,) = runs
        n = len(run.args[1])
        asked.append(n)
        return [n * seconds[n]]

    monkeypatch.setattr(probe, "seconds_on_cpu", timed)
    return nn.Identity(), asked


LARGE = torch.zeros(2, 8, 64, 64)

CHUNKS: list[tuple[dict[int, float], int, list[int]]] = [
    ({1: 1.0, 4: 2.0, 2: 0.9}, 2, [2]),
    ({1: 1.0, 4: 1.02, 2: 1.5}, 4, [2]),
    ({1: 1.0, 4: 0.8, 8: 0.9}, 4, [8]),
    ({1: 1.0, 4: 0.8, 8: 0.75, 16: 0.7, 32: 0.69}, 32, [8, 16, 32]),
    ({1: 1.0, 4: 0.8, 8: 0.75, 16: 0.7, 32: 0.9}, 16, [8, 16, 32]),
    ({1: 0.004, 4: 0.0031, 8: 0.0030, 16: 0.003, 32: 0.003}, 32, [8, 16, 32]),
    ({1: 0.014, 4: 0.0131, 8: 0.0130, 16: 0.01, 32: 0.01}, 8, [8]),
]


@pytest.mark.parametrize(("seconds", "chunk", "asked"), CHUNKS, ids=str)
def test_the_largest_of_the_fastest_chunks(
    seconds: dict[int, float], chunk: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, measured = identity(seconds, monkeypatch)
    known = {n: seconds[n] for n in (1, 4)}
    assert fastest_chunk(module, known, LARGE, torch.contiguous_format) == chunk
    assert measured == asked


@pytest.mark.parametrize(("side", "chunk"), [(104, 64), (105, 8)])
def test_chunks_are_measured_for_large_images(side: int, chunk: int) -> None:
    shape = (3, side, 105)
    heads = [ExitHead("pool", (4, (side + 1) // 2, 53), 5, shape), ExitHead("pool", (2, (side + 1) // 2, 53), 5, shape)]
    net = eefast.EarlyExitNet([stage("residual"), nn.Conv2d(4, 2, 1)], heads, input_shape=shape).eval()
    fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    assert [step.chunk for step in fast.engine.steps] == [chunk] * 2  # type: ignore[attr-defined]
    assert [row.note for row in fast.plan.stages] == ["folded; 8 at a time" if chunk == 8 else "folded"] * 2


def test_stages_that_do_not_take_float64_are_compared_with_float32(offer: Any) -> None:
    only_float32 = Stage(lambda self, x: self.conv(x.to(torch.float32)), conv=nn.Conv2d(3, 4, 1))
    offer(fake=Fake(seconds=0.5))
    found = chosen(only_float32, Chosen(only_float32, "as it is"), images(2, SHAPE), torch.channels_last, "auto", False)
    assert found.note == "Fake (PyTorch takes 2.00×)"


@pytest.fixture(scope="module")
def net() -> Any:
    """Stages with Hardswish and the like, maps of 20×28 and 10×14."""
    torch.manual_seed(0)
    stages = [nn.Sequential(stage("mobile"), nn.Conv2d(6, 3, 1)), stage("residual"), nn.Conv2d(4, 8, 1)]
    shapes = [(3, 20, 28), (4, 10, 14), (8, 10, 14)]
    heads = [ExitHead("pool", shape, 5, (3, 20, 28)) for shape in shapes]
    made = lived_in(eefast.EarlyExitNet(stages, heads, input_shape=(3, 20, 28)), 1)
    spread_thresholds(made, images(64, (3, 20, 28)), 0.4)
    return made


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("n", [0, 1, 3, 31])
def test_exits_are_those_of_single_images(net: Any, name: str, n: int) -> None:
    fast = eefast.accelerate(net, stages=name)
    assert fast.plan.engine == "compact"
    x = images(n, (3, 20, 28))
    for result in (fast(x), next(fast.stream([x]))):
        assert result.logits.shape == (n, 5)
        if n:
            assert_same_answers(result, one_by_one(net, x), net)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stages": "tensorrt"}, "stages='tensorrt' is unknown; choose one of auto, pytorch, onnxruntime"),
        ({"stages": "openvino", "engine": "resident"}, "stages='openvino' is for engine='compact', not for"),
        ({"stages": "pytorch", "engine": "reference"}, "stages='pytorch' is for engine='compact', not for"),
        ({"stages": "compile", "dtype": torch.bfloat16}, "runs stages in float32, not in bfloat16; use"),
    ],
)
def test_wrong_arguments(net: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eefast.accelerate(net, **more)


@pytest.fixture(scope="module")
def in_int8(net: Any) -> Any:
    made = eefast.quantize(net, images(48, (3, 20, 28)))
    spread_thresholds(made, images(64, (3, 20, 28)), 0.4)
    return made


def test_stages_in_int8_run_by_the_fastest_library(in_int8: Any, offer: Any) -> None:
    offer(one=Fake(name="One", seconds=0.5), two=Fake(name="Two", seconds=3.0))
    fast = eefast.accelerate(in_int8)
    assert fast.plan.engine == "compact"
    assert fast.plan.reason.startswith("the resident engine cannot run: stage 0 is in INT8 with layers that it has no")
    # PyTorch only simulates them, so its time is of no interest.
    assert [row.note for row in fast.plan.stages] == ["INT8 by One (Two takes 6.00×)"] * 3
    x = images(31, (3, 20, 28))
    assert_same_answers(fast(x), one_by_one(in_int8, x), in_int8, 1e-3)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(0.9, ""), (1.2, "differ from simulated INT8 by"), (1000.0, "differ by"), (NAN, "differ by nan")],
)
def test_libraries_in_int8_may_round_otherwise_but_no_more(
    in_int8: Any, offer: Any, factor: float, reason: str
) -> None:
    def answer(made: nn.Module, x: Tensor) -> Tensor:
        whole = inference_copy(made)
        round_nothing(whole)
        return made(x) + factor * (whole(x) - made(x))

    offer(fake=Fake(answer, seconds=0.5), good=Fake(name="Good", seconds=0.7))
    notes = [row.note for row in eefast.accelerate(in_int8).plan.stages]
    assert all(("left out: its answers" in note) == bool(reason) for note in notes)
    assert all(reason in note for note in notes)


def test_without_another_library_int8_is_simulated_and_says_so(in_int8: Any, offer: Any, caplog: Any) -> None:
    planner.log_once.cache_clear()
    offer(absent=Fake(name="Fake", absent="fake not installed: pip install fake"))
    fast = eefast.accelerate(in_int8)
    assert "stages in INT8 run in PyTorch, slower than in float32: pip install onnx onnxruntime openvino" in caplog.text
    assert [row.note for row in fast.plan.stages] == ["INT8 computed in float32 by PyTorch"] * 3
    assert "Fake left out: fake not installed" in fast.plan.reason
    x = images(31, (3, 20, 28))
    assert_same_answers(fast(x), one_by_one(in_int8, x), in_int8, 1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"engine": "resident"}, "engine='resident' cannot run: stage 0 is in INT8 with layers that it has no step in"),
        ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16: a quantised network computes in integers"),
    ],
)
def test_what_stages_in_int8_are_not_run_by(in_int8: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eefast.accelerate(in_int8, **more)


@pytest.mark.parametrize("name", INSTALLED)
def test_exits_in_int8_are_those_of_the_simulation_but_for_a_margin(in_int8: Any, name: str) -> None:
    fast, x = eefast.accelerate(in_int8, stages=name), images(64, (3, 20, 28))
    assert all(row.note.startswith("INT8 by ") for row in fast.plan.stages)
    outputs = in_int8.all_exits(x)
    expected, found = one_by_one(in_int8, x), fast(x)
    near = torch.stack([(o.confidence - t).abs() for o, t in zip(outputs, in_int8.thresholds, strict=False)]).amin(0)
    clear = near > 0.003
    assert clear.float().mean() > 0.8
    assert torch.equal(found.exit_index[clear], expected.exit_index[clear])
    error = (found.logits - expected.logits)[clear].norm() / expected.logits[clear].norm()
    assert error < 0.02


def test_quantised_stages_are_left_alone(offer: Any) -> None:
    offer(onnxruntime=Fake(seconds=0.1))
    small = lived_in(zoo.eenet("eenet8", 2, "linear", "pool", 3, input_shape=(1, 6, 7), filters=2), 1)
    quantised = eefast.quantize(small, images(16, (1, 6, 7)))
    assert [row.note for row in eefast.accelerate(quantised, engine="compact").plan.stages] == ["INT8 by PyTorch"] * 3
    with pytest.raises(ValueError, match="stages='compile': this network is in integers that only eefast computes"):
        eefast.accelerate(quantised, stages="compile")


ELSEWHERE = """
import os, pickle, sys, torch
torch.set_num_threads(1)
where, inputs, way = sys.argv[1:]
fast = pickle.load(open(where, "rb"))
x, expected = torch.load(inputs)
if way == "forked":
    fast(x)
    child = os.fork()
    if child:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
try:
    got = fast(x)
except ValueError as error:
    os._exit(3 if "start that by 'spawn'" in str(error) else 1)
ok = torch.equal(got.exit_index, expected[0]) and torch.allclose(got.logits, expected[1], rtol=0, atol=1e-4)
os._exit(0 if ok and "PyTorch" not in fast.plan.stages[0].note else 1)
"""


@pytest.mark.parametrize("way", ["spawned", "forked"])
@pytest.mark.parametrize("name", INSTALLED)
def test_other_processes_build_their_stages(name: str, way: str, tmp_path: Path) -> None:
    small = lived_in(zoo.eenet("eenet8", 2, "linear", "pool", 3, input_shape=(1, 6, 7), filters=2), 1)
    x = images(9, (1, 6, 7))
    fast = eefast.accelerate(small, stages=name)
    expected = fast(x)
    (tmp_path / "fast").write_bytes(pickle.dumps(fast))
    torch.save((x, (expected.exit_index, expected.logits)), tmp_path / "inputs")
    words = [sys.executable, "-c", ELSEWHERE, tmp_path / "fast", tmp_path / "inputs", way]
    # OpenVINO would hang.
    refused = (name, way) == ("openvino", "forked")
    assert subprocess.run(words, timeout=120, check=False).returncode == (3 if refused else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", INSTALLED)
def test_memory_stays_flat(net: Any, name: str) -> None:
    fast = eefast.accelerate(net, stages=name, frozen=True)
    parts = [images(n, (3, 20, 28)) for n in (1, 31, 64)]

    def megabytes_after(calls: int) -> float:
        for i in range(calls):
            fast(parts[i % len(parts)])
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize() / 1e6

    before = megabytes_after(200)
    assert megabytes_after(1000) < before + 5


@pytest.mark.slow
def test_stages_by_torch_compile(net: Any) -> None:
    fast = eefast.accelerate(net, stages="compile")
    for n in (0, 1, 3, 31):
        x = images(n, (3, 20, 28))
        result = fast(x)
        assert result.logits.shape == (n, 5)
        if n:
            assert_same_answers(result, one_by_one(net, x), net)
