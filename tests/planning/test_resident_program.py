"""What the resident engine refuses, by name and before it is built, and what it is measured on and checked against."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one
from torch import nn

import eefast
from eefast import ops, zoo
from eefast.planning import probe, trial, tuning
from eefast.planning.errors import UnsupportedError
from eefast.planning.resident_program import build_resident, lowered
from eefast.planning.rows import network_on_maps
from eefast.planning.trial import Subject

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
SHAPE = (1, 6, 7)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def network(shape: tuple[int, int, int] = SHAPE) -> Any:
    return lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=shape, filters=2), 1)


def subject(net: Any, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> Subject:
    return Subject(net, device, dtype, trial.expected(net, probe.images(net)))


@pytest.fixture(scope="module")
def net() -> Any:
    return network()


def dilated(net: Any) -> nn.Module:
    channels = net.stage_costs[1].feature_shape[0]
    return nn.Conv2d(channels, channels, 3, padding=2, dilation=2)


@needs_cpp
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda net: net.double(), "computes in float32 or bfloat16, not in torch.float64"),
        (lambda net: net.stages[1].append(dilated(net)), r"stage 1 has Conv2d\(4, 4.*dilation=\(2, 2\).*\(at 1\)"),
        (lambda net: net.stages[1].append(nn.Tanh()), r"stage 1 has Tanh.*no step for \(at 1\)"),
    ],
    ids=["float64", "dilated", "tanh"],
)
def test_what_it_cannot_run_is_refused_by_name_and_auto_runs_compact(
    net: Any, change: Callable[[Any], Any], reason: str
) -> None:
    net = copy.deepcopy(net)
    change(net)
    with pytest.raises(ValueError, match=f"engine='resident' cannot run: .*{reason}.*use engine='compact' or 'auto'"):
        eefast.accelerate(net, engine="resident")
    fast: Any = eefast.accelerate(net)
    assert fast.plan.engine == "compact"
    assert "the resident engine cannot run: " in str(fast.plan)
    given = images(9, SHAPE).to(next(net.parameters()).dtype)
    assert_same_answers(fast(given), one_by_one(net, given), net)


@pytest.mark.parametrize(
    ("device", "dtype", "here", "reason"),
    [
        (CPU, torch.float32, {"CPP_MISSING": "not built"}, "its C++ kernels are not built"),
        (CPU, torch.float16, {}, "it computes in float32 or bfloat16, not in torch.float16"),
        (CUDA, torch.float16, {"CUDA_MISSING": "not built"}, "its CUDA kernels are not built"),
        (CUDA, torch.float32, {}, "in float16 or bfloat16, not in torch.float32; pass dtype=torch.float16"),
    ],
    ids=["no C++", "float16", "no CUDA", "float32 on CUDA"],
)
def test_devices_and_dtypes_without_a_kernel(
    net: Any, device: torch.device, dtype: torch.dtype, here: dict[str, Any], reason: str, monkeypatch: Any
) -> None:
    for name, value in ({"CPP_MISSING": None, "CUDA_MISSING": None} | here).items():
        monkeypatch.setattr(ops, name, value)
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        lowered(subject(net, device, dtype))


@pytest.mark.parametrize("shape", [(1, 33, 7), (1, 6, 40)], ids=str)
def test_larger_images_are_refused_on_cuda_alone(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(shape)
    monkeypatch.setattr(ops, "CPP_MISSING", None)
    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    assert lowered(subject(net)).sizes[0] == shape[1:]
    with pytest.raises(UnsupportedError, match=f"images of up to 32×32, not {shape[1]}×{shape[2]}"):
        lowered(subject(net, CUDA, torch.float16))


def test_rows_are_refused_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network_on_maps(zoo.eenet("eenet20-1d", input_shape=(6, 31)).eval())
    monkeypatch.setattr(ops, "CPP_MISSING", None)
    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    assert lowered(subject(net)).sizes[0] == (1, 31)
    with pytest.raises(UnsupportedError, match="its CUDA kernel has square windows of square maps, none for rows"):
        lowered(subject(net, CUDA, torch.float16))


def test_what_the_cuda_kernel_says_it_lacks_is_the_reason(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*arguments: Any) -> int:
        raise RuntimeError("the CUDA kernel has no max pooling")

    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    monkeypatch.setattr(ops, "resident_shared_memory", lacking)
    with pytest.raises(UnsupportedError, match=r"^the CUDA kernel has no max pooling$"):
        lowered(subject(net, CUDA, torch.float16))


def test_the_cuda_kernel_takes_rules_that_carry(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_MISSING", None)
    monkeypatch.setattr(ops, "resident_shared_memory", lambda *_: 1)
    assert lowered(subject(net.with_criterion("vote").eval(), CUDA, torch.float16)).layers


def with_other_rows(given: Subject, exit_index: int) -> Subject:
    """The subject of a network whose answers at one exit are others."""
    expected = list(given.expected)
    expected[exit_index] = replace(expected[exit_index], rows=expected[exit_index].rows * 1.01)
    return replace(given, expected=tuple(expected))


@needs_cpp
@pytest.mark.parametrize("exit_index", [0, 1, 2])
def test_layers_and_programs_with_other_answers_than_the_network_are_refused(net: Any, exit_index: int) -> None:
    given = subject(net)
    wrong = with_other_rows(given, exit_index)
    with pytest.raises(
        UnsupportedError, match=f"as its steps, the network's answers differ by .* at exit {exit_index}"
    ):
        lowered(wrong)
    with pytest.raises(UnsupportedError, match=f"its answers differ by .* at exit {exit_index}"):
        build_resident(wrong, lowered(given))


@needs_cpp
def test_a_stage_runs_the_sections_of_its_maps(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that makes maps smaller has rows in two sections."""
    monkeypatch.setattr(tuning, "choices", {})
    monkeypatch.setattr(tuning, "fastest", lambda net, sections, *_: ((4, 0, 2)[:sections], (1, 8, 4)[:sections]))
    rows = eefast.accelerate(net, engine="resident").plan.stages
    assert [row.note for row in rows] == [
        "6×7 F(4×4)",
        "6×7 F(4×4), 3×4 direct by 8",
        "3×4 direct by 8, 2×2 F(2×2) by 4",
    ]
    assert {row.kernel for row in rows} == {f"C++, {ops.instruction_set().replace('_', '-')}"}


@needs_cpp
def test_examples_are_what_is_measured_on(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, tuned, x = [], tuning.tuned, images(9, SHAPE)

    def recorded(net: Any, lowered: Any, bfloat16: bool, images: torch.Tensor) -> Any:
        seen.append(images)
        return tuned(net, lowered, bfloat16, images)

    monkeypatch.setattr(tuning, "tuned", recorded)
    eefast.accelerate(net, engine="resident", example_inputs=x[:3])
    assert torch.equal(seen[0], x[torch.arange(probe.IMAGES) % 3])
    with pytest.raises(ValueError, match=r"x has shape \(1, 6\)"):
        eefast.accelerate(net, engine="resident", example_inputs=x[0, :, :, 0])
