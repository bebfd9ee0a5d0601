"""bfloat16 asked for on the CPU: computed in bfloat16 or, where that is slow, in float32, by measured times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import ops, zoo
from eefast.planning import bfloat16_choice, probe, tuning

pytestmark = pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
needs_bfloat16 = pytest.mark.skipif(ops.instruction_set() != "avx512_bf16", reason="needs AVX512-BF16")


@pytest.fixture(scope="module")
def net() -> Any:
    made = lived_in(zoo.eenet("eenet20", 1, input_shape=(3, 15, 13)), 1)
    spread_thresholds(made, images(65, (3, 15, 13)), 0.4)
    return made


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16_choice, "speeds", {})
    monkeypatch.setattr(tuning, "choices", {})


def planned(net: Any, monkeypatch: pytest.MonkeyPatch, *seconds: float) -> eefast.Accelerated:
    monkeypatch.setattr(probe, "fastest_of", lambda runs: seconds)
    return eefast.accelerate(net, engine="resident", dtype=torch.bfloat16)


@needs_bfloat16
def test_slow_bfloat16_gives_way_to_float32(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, told = images(65, net.input_shape), "computed in float32, which is 3.0× as fast as bfloat16 here"
    fast = planned(net, monkeypatch, 0.006, 0.002)
    assert not fast.engine.program.bfloat16  # type: ignore[attr-defined]
    assert f"{told} (8 images: 6.0 ms in bfloat16, 2.0 in float32)" in str(fast.plan)
    assert fast.plan.dtype == torch.bfloat16
    assert_same_answers(fast(x), one_by_one(net, x), net)
    # Images in bfloat16 are read, logits are float32 in either arithmetic.
    halves = x.bfloat16()
    found, wanted = fast(halves), one_by_one(net, halves.float())
    assert found.logits.dtype == torch.float32
    assert_same_answers(found, wanted, net)


@needs_bfloat16
def test_fast_bfloat16_is_taken(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = planned(net, monkeypatch, 0.001, 0.0025)
    assert fast.engine.program.bfloat16  # type: ignore[attr-defined]
    assert not any(fast.engine.program.algorithms)  # type: ignore[attr-defined]
    told = "bfloat16 is 2.5× as fast as float32 here (8 images: 1.0 ms in bfloat16, 2.5 in float32)"
    assert told in str(fast.plan)
    x = images(65, net.input_shape)
    got, wanted = fast(x), one_by_one(net, x)
    same = got.exit_index == wanted.exit_index
    assert int(same.sum()) >= 59
    assert float((got.confidence - wanted.confidence)[same].abs().max()) < 0.05


@needs_bfloat16
def test_measured_here_the_faster_one_is_taken_and_measured_once(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = eefast.accelerate(net, engine="resident", dtype=torch.bfloat16)
    ((in_bfloat16, in_float32),) = bfloat16_choice.speeds.values()
    assert fast.engine.program.bfloat16 == (in_bfloat16 <= in_float32)  # type: ignore[attr-defined]
    monkeypatch.setattr(probe, "fastest_of", lambda runs: pytest.fail("it was measured before"))
    again = eefast.accelerate(net, engine="resident", dtype=torch.bfloat16)
    assert again.plan.reasons == fast.plan.reasons


def test_without_avx512_bf16_it_is_computed_in_float32(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "instruction_set", lambda: "avx2")
    fast = eefast.accelerate(net, engine="resident", dtype=torch.bfloat16)
    assert "computed in float32, since the instruction set avx2 has no bfloat16" in str(fast.plan)
    x = images(31, net.input_shape)
    assert_same_answers(fast(x), one_by_one(net, x), net)
    # A network of bfloat16 weights takes images of its dtype.
    halved = zoo.eenet("eenet20", 1, input_shape=(3, 15, 13)).eval().bfloat16()
    found = eefast.accelerate(halved, engine="resident")(x.bfloat16())
    assert found.logits.dtype == torch.float32
