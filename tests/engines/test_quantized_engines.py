"""Quantised networks by `accelerate`: the answers of all engines, what the plan says, what is refused and noticed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from quantized_networks import NORMALIZATION, network
from torch import Tensor

import eefast
from eefast import ops, zoo
from eefast.planning import planner, resident_program, trial, tuning
from eefast.planning.errors import UnsupportedError
from eefast.planning.integer_lowering import lower_integers
from eefast.quantized import QuantizedStage

needs_cpp = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
ENGINES = ["reference", "compact", pytest.param("resident", marks=needs_cpp), "auto"]
SHAPE = (3, 11, 9)


@pytest.fixture(scope="module")
def net() -> eefast.EarlyExitNet:
    made = network(1, SHAPE, normalization=NORMALIZATION)
    spread_thresholds(made, images(31, SHAPE), 0.4)
    return made


@pytest.fixture(scope="module")
def x() -> Tensor:
    return images(31, SHAPE)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randint(0, 256, (7, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured before."""
    monkeypatch.setattr(tuning, "choices", {})
    monkeypatch.setattr(planner, "speeds", {})


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"blocks": "pre-activation", "head": "bnpool"}, {"blocks": "pool", "head": "conv2"}, {"head": "plain"}],
    ids=["basic", "pre-activation", "pool", "plain"],
)
@pytest.mark.sampled(6)
def test_every_engine_gives_the_answers_of_the_network(arguments: dict[str, str], engine: str) -> None:
    net = network(3, (3, 7, 8), width=5, **arguments)  # type: ignore[arg-type]
    x = images(31, net.input_shape)
    spread_thresholds(net, x, 0.4)
    fast = eefast.accelerate(net, engine=engine)
    assert fast.plan.engine == engine or engine == "auto"
    wanted = one_by_one(net, x)
    assert_same_answers(fast(x), wanted, net, 1e-5)
    assert_same_answers(torch.compile(fast)(x), wanted, net, 1e-5)
    assert len(fast(x[:0]).labels) == 0


@needs_cpp
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("eenet20", {"head": "conv1"}),
        ("eenet8", {"filters": 5}),
        ("eenet20", {"head": "bnpool", "num_exits": 3}),
        ("eenet20", {"head": "strided2", "placement": (0, 4)}),
        ("eenet20", {"head": "deep2", "placement": (0, 4)}),
    ],
    ids=["conv1", "pre-activation", "bnpool", "strided", "deep"],
)
@pytest.mark.sampled(2)
def test_what_quantize_makes_runs_with_the_answers_of_the_network(name: str, arguments: dict[str, Any]) -> None:
    shape = (3, 11, 14)
    arguments = {"num_exits": 2, "placement": "linear", "input_shape": shape, **arguments}
    net = eefast.quantize(lived_in(zoo.eenet(name, **arguments), 1), images(24, shape, 7))
    x = images(31, shape, 5)
    spread_thresholds(net, x, 0.4)
    fast = eefast.accelerate(net, engine="resident")
    assert_same_answers(fast(x), one_by_one(net, x), net, 1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_streams_take_bytes_and_floats(net: Any, x: Tensor, pixels: Tensor, engine: str) -> None:
    fast = eefast.accelerate(net, engine=engine)
    got = list(fast.stream([x[:9], pixels, x[9:]]))
    for found, batch in zip(got, (x[:9], net.prepare(pixels), x[9:]), strict=True):
        assert_same_answers(found, one_by_one(net, batch), net, 1e-5)


@needs_cpp
def test_bytes_reach_the_op_as_they_are(net: Any, x: Tensor, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, run = list[torch.dtype](), ops.resident_int8.run
    fast = eefast.accelerate(net, engine="resident")

    def recorded(images: Tensor, *more: Any) -> tuple[Tensor, ...]:
        seen.append(images.dtype)
        return run(images, *more)

    monkeypatch.setattr(ops.resident_int8, "run", recorded)
    found, wanted = fast(pixels), fast(net.prepare(pixels))
    fast(x.double().float())
    assert seen == [torch.uint8, torch.float32, torch.float32]
    assert torch.equal(found.logits, wanted.logits)
    without = eefast.accelerate(network(1, SHAPE), engine="resident")
    with pytest.raises(ValueError, match="x is uint8, but this network has no normalization"):
        without(pixels)


CHANGES: dict[str, Callable[[QuantizedStage], Any]] = {
    "weight": lambda stage: cast(Any, stage.steps[1]).weight.neg_(),
    "ratio": lambda stage: cast(Any, stage.steps[2]).ratio.mul_(0.5),
    "image": lambda stage: cast(Tensor, stage.image).mul_(1.5),
    "scale exchanged": lambda stage: setattr(stage.steps[0], "scale", cast(Any, stage.steps[0]).scale * 1.3),
}


@pytest.mark.parametrize("engine", [ENGINES[1], ENGINES[2]])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_buffers_are_noticed(net: Any, x: Tensor, engine: Any, change: str) -> None:
    net = copy.deepcopy(net)
    fast = eefast.accelerate(net, engine=engine)
    before = fast(x)
    CHANGES[change](net.stages[0])
    assert_same_answers(fast(x), one_by_one(net, x), net, 1e-5)
    assert not torch.equal(fast(x).logits, before.logits)


@needs_cpp
def test_copies_plan_for_themselves(net: Any, x: Tensor) -> None:
    fast = eefast.accelerate(net, engine="resident")
    wanted = fast(x)
    for copied in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(copied(x).logits, wanted.logits)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_refused(net: Any, engine: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype}: a quantised network computes in integers"):
        eefast.accelerate(net, engine=engine, dtype=dtype)
    with pytest.raises(ValueError, match=f"the heads of this quantised network are {dtype}; use net.float"):
        eefast.accelerate(copy.deepcopy(net).to(dtype), engine=engine)


# The plan


@needs_cpp
def test_group_sizes_are_measured_and_the_plan_shows_them(
    net: Any, x: Tensor, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, run = list[tuple[int, ...]](), tuning.run

    def timed(net: Any, program: Any, images: Tensor, limits: Tensor, seconds: Tensor | None = None) -> Tensor:
        if seconds is not None:  # groups of eight are fastest at the first size, lone samples at the second
            asked.append(program.algorithms)
            first, second = program.group_sizes
            seconds += torch.tensor([9.0 - first, 1.0 * second])
        return run(net, program, images, limits)

    monkeypatch.setattr(tuning, "run", timed)
    monkeypatch.setattr(ops, "int8_instruction_set", lambda: "avx512_vnni")
    fast = eefast.accelerate(net, engine="resident")
    assert set(asked) == {(0, 0)}
    assert cast(Any, fast.engine).program.group_sizes == (8, 1)
    text = str(fast.plan)
    assert "C++, INT8, avx512-vnni  11×9 F(2,3) by 8, 6×5 1 F(2×2) + 1 F(2,3) + 1 direct" in text
    assert "without VNNI" not in text
    assert_same_answers(fast(x), one_by_one(net, x), net, 1e-5)
    direct = eefast.accelerate(network(1, SHAPE, winograd=(0,)), engine="resident")
    assert "11×9 direct" in str(direct.plan)


@needs_cpp
@pytest.mark.parametrize("instructions", ["portable", "avx2"])
def test_without_vnni_the_plan_says_once_that_float32_is_faster(
    net: Any, instructions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "int8_instruction_set", lambda: instructions)
    text = str(eefast.accelerate(net, engine="resident").plan)
    told = "without VNNI the INT8 kernels are slow here, and the float32 network is faster: run the network that was"
    assert text.count(told) == 1
    assert text.count(f"C++, INT8, {instructions}") == 3


def test_the_compact_engine_says_what_computes_the_stages(net: Any) -> None:
    assert [row.note for row in eefast.accelerate(net, engine="compact").plan.stages] == ["INT8 by PyTorch"] * 3


@needs_cpp
def test_a_program_with_other_answers_is_refused(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(net: Any) -> Any:
        lowered = lower_integers(net)
        layers = [replace(layer, bias=layer.bias + 1000) for layer in lowered.layers[:1]]
        return replace(lowered, layers=(*layers, *lowered.layers[1:]))

    monkeypatch.setattr(resident_program, "lower_integers", broken)
    with pytest.raises(ValueError, match=r"engine='resident' cannot run: its answers differ by .* at exit 0"):
        eefast.accelerate(net, engine="resident")


def test_on_cuda_and_without_cpp_the_resident_engine_is_refused(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = trial.expected(net, images(2, SHAPE))
    with pytest.raises(UnsupportedError, match="it has no INT8 kernels on CUDA"):
        resident_program.lowered(trial.Subject(net, torch.device("cuda"), torch.float32, seen))
    monkeypatch.setattr(ops, "CPP_MISSING", "not built")
    with pytest.raises(ValueError, match=r"its C\+\+ kernels are not built; use engine='compact' or 'auto'"):
        eefast.accelerate(net, engine="resident")
    plan = eefast.accelerate(net).plan
    assert plan.engine == "compact"
    assert "the resident engine cannot run: its C++ kernels are not built" in str(plan)
