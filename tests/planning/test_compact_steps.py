"""What the compact engine runs for each stage and head, and what it refuses, with devices that are not here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import lived_in
from odd_networks import conv, network
from runtime_stages import in_a_library
from torch import nn

from eefast import ops, zoo
from eefast.engines import CompactEngine
from eefast.planning import compact_steps, probe, trial
from eefast.planning.compact_steps import build_compact, obstacle
from eefast.planning.compiled_stages import SECONDS
from eefast.planning.errors import SlowerError, UnsupportedError
from eefast.planning.folding import fold_stage
from eefast.planning.stage_runtimes import Chosen
from eefast.planning.trial import Subject

SHAPE = (1, 6, 7)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def subject(head: str = "pool", device: torch.device = CPU) -> Subject:
    return subject_of(lived_in(zoo.eenet("eenet8", 2, "linear", head, 3, input_shape=SHAPE, filters=2), 1), device)


def subject_of(net: Any, device: torch.device = CPU) -> Subject:
    return Subject(net, device, torch.float32, trial.expected(net, probe.images(net)))


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EEFAST_GRAPHS", "0")
    monkeypatch.setattr(compact_steps, "seconds_of", lambda stages, features: [0.0])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says what evaluates exits on GPUs."""
    return lambda name: monkeypatch.setattr(ops, "exit_kernels", lambda: name)


def kinds(engine: CompactEngine) -> list[str]:
    return [row.kernel for row in engine.plan.stages]


@pytest.mark.parametrize(
    ("device", "name", "classes", "reason"),
    [
        (CPU, "", 10**6, ""),
        (CUDA, "triton", 8191, ""),
        (
            CUDA,
            "triton",
            ops.MAX_CLASSES_ON_CUDA + 1,
            f"heads go to {ops.MAX_CLASSES_ON_CUDA} classes, the network has",
        ),
        (CUDA, "", 3, "Triton is not here, and the CUDA kernels are not built"),
    ],
    ids=["CPU", "CUDA", "too many classes", "no kernels"],
)
def test_exits_without_a_kernel(
    device: torch.device, name: str, classes: int, reason: str, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels(name)
    monkeypatch.setattr(ops, "TRITON_MISSING", "Triton is not here")
    monkeypatch.setattr(ops, "CUDA_MISSING", "not built")
    given = subject(device=device)
    monkeypatch.setattr(given.net, "num_classes", classes)
    found = obstacle(given.net, device)
    assert reason in found
    assert bool(found) == bool(reason)
    if reason:
        with pytest.raises(UnsupportedError) as refusal:
            build_compact(given)
        assert str(refusal.value) == found


def test_cuda_runs_rules_that_carry_but_none_in_python(kernels: Any) -> None:
    kernels("triton")
    net = subject().net.with_criterion("patience")
    assert obstacle(net, CUDA) == ""
    net.criterion = replace(net.criterion, step=lambda *_: pytest.fail("called"))
    assert obstacle(net, CUDA) == "criterion 'patience' is a rule in Python, which CUDA graphs do not hold"


@pytest.mark.parametrize("missing", [None, "not built"], ids=["C++", "no C++"])
def test_on_the_cpu_exits_run_in_cpp_or_in_pytorch(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CPP_MISSING", missing)
    engine = build_compact(replace(subject(), stages="pytorch"))
    assert kinds(engine) == ["PyTorch" if missing else "C++"] * 3
    assert engine.plan.reasons == (("exits run in PyTorch, since the C++ kernels are not built",) if missing else ())


@pytest.mark.parametrize(
    ("head", "device", "name", "kernel"),
    [
        ("pool", CUDA, "triton", "Triton"),
        ("conv1", CUDA, "triton", "Triton with conv"),
        ("conv3", CUDA, "triton", "Triton with conv"),
        ("conv1", CUDA, "cuda", "CUDA"),
        ("conv1", CPU, "triton", "PyTorch"),
    ],
)
def test_the_last_convolution_of_a_head_goes_into_the_triton_kernel(
    head: str, device: torch.device, name: str, kernel: str, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels(name)
    monkeypatch.setattr(ops, "CPP_MISSING", "not built")
    engine = build_compact(replace(subject(head, device), stages="pytorch"))
    # The final exit has no convolution.
    assert kinds(engine)[:2] == [kernel] * 2
    convs = int(head.removeprefix("conv")) if "conv" in head else 0
    for step in engine.steps[:2]:
        left = sum(isinstance(m, nn.Conv2d) for m in step.head_convs.modules())
        assert left + (step.conv is not None) == convs
        assert (step.conv is not None) == ("with conv" in kernel)


@pytest.mark.parametrize("head", ["pool", "bnpool", "plain", "conv1", "depthwise", "strided2"])
def test_plain_heads_read_the_whole_map(head: str) -> None:
    assert [step.flatten for step in build_compact(subject_of(network(conv(), head=head))).steps] == [
        head == "plain"
    ] * 2


@pytest.mark.parametrize(
    ("head", "name", "counted"),
    [
        ("pool", "triton", True),
        ("conv1", "triton", True),
        ("conv2", "triton", False),
        ("depthwise", "triton", False),
        ("pool", "cuda", False),
    ],
)
def test_stages_count_their_rows_where_triton_evaluates_heads_of_one_convolution(
    head: str, name: str, counted: bool, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions of a head before the last one would run on the dead rows, too."""
    kernels(name)
    given = subject(head, CUDA)
    monkeypatch.setattr(compact_steps, "device_counted", lambda stage, dtype: Counted(stage))
    steps = build_compact(given).steps
    assert [isinstance(step.counted, Counted) for step in steps[:2]] == [False, counted]


@pytest.mark.parametrize(("seconds", "counted"), [(1e-5, True), (1e-3, False)])
def test_only_short_stages_count_their_rows(
    seconds: float, counted: bool, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels("triton")
    monkeypatch.setattr(compact_steps, "seconds_of", lambda stages, features: [seconds])
    built: list[nn.Module] = []
    monkeypatch.setattr(compact_steps, "device_counted", lambda stage, dtype: built.append(stage))
    given = subject(device=CUDA)
    build_compact(given)
    assert built == (list(given.net.stages)[1:] if counted else [])


@pytest.mark.parametrize("most", [3, 40])
def test_stages_are_measured_on_the_rows_that_are_expected(
    most: int, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels("triton")
    measured: list[int] = []

    def fastest(
        stage: nn.Module, dtype: torch.dtype, features: torch.Tensor, compile_time: Any
    ) -> tuple[nn.Module, str]:
        measured.append(len(features))
        return fold_stage(stage, dtype)

    monkeypatch.setattr(compact_steps, "fastest_stage", fastest)
    given = replace(subject(device=CUDA), max_batch_size=most)
    build_compact(given)
    assert measured == [32] * 3
    measured.clear()
    x = probe.noise(20, SHAPE)
    build_compact(replace(given, example_inputs=x))
    taken = given.net.first_exits(x).exit_index
    on = [int((taken >= i).sum()) / 20 for i in range(3)]
    assert measured[0] == most
    for rows, share in zip(measured, on, strict=True):
        assert most * share <= rows <= min(most, most * share + most**0.5 + 1)


@pytest.mark.parametrize(("stages", "seconds"), [("auto", SECONDS), ("pytorch", 0)])
def test_all_stages_share_the_time_to_compile(
    stages: str, seconds: float, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels("triton")
    given: list[Any] = []

    def fastest(stage: nn.Module, dtype: torch.dtype, *others: Any) -> tuple[nn.Module, str]:
        given.append(others[-1])
        return fold_stage(stage, dtype)

    monkeypatch.setattr(compact_steps, "fastest_stage", fastest)
    build_compact(replace(subject(device=CUDA), stages=stages))
    assert [time.left for time in given] == [seconds] * 3
    assert len(set(map(id, given))) == 1


class Counted(nn.Module):
    """The stage in a form that is given the rows and how many of them count."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: torch.Tensor, rows: None, live: torch.Tensor) -> torch.Tensor:
        assert int(live) == len(x)
        return self.stage(x)  # type: ignore[no-any-return]


def other_answers(module: nn.Module) -> nn.Module:
    """Zeros."""
    return nn.Sequential(module, nn.Threshold(1e9, 0.0))


def test_counted_forms_with_other_answers_are_left_out(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels("triton")
    monkeypatch.setattr(compact_steps, "device_counted", lambda stage, dtype: Counted(other_answers(stage)))
    assert [step.counted for step in build_compact(subject(device=CUDA)).steps] == [None] * 3


def test_where_folding_changes_answers_the_stage_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    fold, calls = compact_steps.fold_stage, []

    def wrong_once(stage: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str]:
        calls.append(stage)
        folded, note = fold(stage, dtype)
        return (other_answers(folded) if len(calls) == 1 else folded), note

    given = replace(subject(), stages="pytorch")
    monkeypatch.setattr(compact_steps, "fold_stage", wrong_once)
    notes = [row.note for row in build_compact(given).plan.stages]
    assert notes[0].startswith("not folded: answers differ by 1 of the largest")
    assert notes[1:] == ["folded", "folded"]


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [
        ((1.0, 1.0, 1.0), ""),
        ((1.9, 1.0, 1.0), "the stages up to exit 0 take 1.9× as long (1900.0 ms per image, 1000.0)"),
        ((1.6, 0.6, 1.2), "the stages up to exit 2 take 1.1× as long (3400.0 ms per image, 3000.0)"),
        ((1.4, 0.8, 0.9), ""),
        ((1.0, 1.4, 1.0), "the stages up to exit 1 take 1.2× as long (2400.0 ms per image, 2000.0)"),
    ],
)
def test_what_cannot_beat_an_engine_that_is_ready_is_not_built(
    seconds: tuple[float, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, each = replace(subject(), rival=(1.0, 2.0, 3.0)), iter(seconds)

    def chosen(stage: Any, folded: Chosen, *rest: Any) -> Chosen:
        found, (*_, spend, _, _) = replace(folded, seconds=next(each)), rest
        spend(found.seconds)
        return found

    monkeypatch.setattr(compact_steps, "chosen", chosen)
    if reason:
        with pytest.raises(SlowerError) as error:
            build_compact(given)
        assert str(error.value) == reason
    else:
        assert len(build_compact(given).steps) == 3


@pytest.mark.parametrize(("megabytes", "chunks"), [(16, [256, 64, 256]), (1, [161, 64, 256]), (0.1, [64, 64, 64])])
def test_libraries_take_more_small_images_at_a_time_than_pytorch_as_far_as_features_fit(
    megabytes: float, chunks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = lived_in(zoo.eenet("eenet8", 2, "linear", num_classes=3, input_shape=(2, 29, 28), filters=2), 1)
    each = iter("LPL")

    def chosen(stage: Any, folded: Chosen, seen: Any, *rest: Any) -> Chosen:
        return replace(folded, stage=in_a_library(folded.stage, seen)) if next(each) == "L" else folded

    monkeypatch.setattr(compact_steps, "chosen", chosen)
    monkeypatch.setattr("eefast.planning.stage_runtimes.MEGABYTES", megabytes)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert [step.chunk for step in build_compact(subject_of(net)).steps] == chunks


@pytest.mark.parametrize("name", ["onnxruntime", "compile"])
def test_stages_of_other_libraries_are_for_cpus(kernels: Any, name: str) -> None:
    kernels("triton")
    with pytest.raises(ValueError, match=f"stages='{name}' is for CPUs, the network is on cuda; leave stages out"):
        build_compact(replace(subject(device=CUDA), stages=name))


def test_where_no_copy_gives_the_answers_the_stage_is_named() -> None:
    given = subject()
    expected = list(given.expected)
    expected[1] = replace(expected[1], features=expected[1].features * 1.1)
    with pytest.raises(UnsupportedError, match=r"^stage 1: answers differ by 0\.\d+ of the largest$"):
        build_compact(replace(given, expected=tuple(expected)))


def test_where_the_packed_head_gives_other_answers_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pack, packed = compact_steps.pack_head, []

    def wrong_for_the_second(head: Any) -> Any:
        packed.append(head)
        weight, bias = pack(head)
        return weight, bias + (len(packed) == 2)

    monkeypatch.setattr(compact_steps, "pack_head", wrong_for_the_second)
    with pytest.raises(UnsupportedError, match=r"^the head of exit 1: answers differ by "):
        build_compact(subject())
