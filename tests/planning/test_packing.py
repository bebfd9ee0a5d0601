"""Programs of the resident engine: the table of steps, and weights that are packed once for each algorithm."""

from __future__ import annotations

import pytest
import torch
from networks import lived_in

from eefast import zoo
from eefast.ops import Kind
from eefast.ops.resident_steps import COLUMNS
from eefast.planning import weight_order
from eefast.planning.layers import Lowered
from eefast.planning.lowering import lower
from eefast.planning.packing import PackedWeights, cuda_program, program


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    return lower(lived_in(zoo.eenet("eenet8", 2, input_shape=(1, 8, 8)), 1))


def column(steps: torch.Tensor, name: str) -> list[int]:
    return steps[:, COLUMNS.index(name)].tolist()


@pytest.mark.parametrize("algorithm", [0, 2, 4])
def test_weights_begin_where_the_steps_say(lowered: Lowered, algorithm: int) -> None:
    sections = len(lowered.sizes)
    made = program(lowered, (algorithm,) * sections, (1,) * sections, False, {})
    assert column(made.steps, "kind") == [layer.kind for layer in lowered.layers]
    used = [algorithm if layer.allows_winograd else 0 for layer in lowered.layers]
    assert column(made.steps, "winograd") == used
    for layer, side, begin, at in zip(
        lowered.layers, used, column(made.steps, "weight"), column(made.steps, "packed"), strict=True
    ):
        n = layer.weight.numel()
        assert torch.equal(made.weights[begin : begin + n], layer.weight.flatten())
        assert torch.equal(made.weights[begin + n : begin + n + len(layer.bias)], layer.bias)
        assert at % weight_order.BLOCK == 0
        if layer.kind == Kind.CONVOLUTION:
            packed = weight_order.convolution(layer.weight, layer.bias, side, layer.source == 0, False)
            assert torch.equal(made.packed[at : at + len(packed)], packed)


def test_what_was_packed_before_is_taken(lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    sections, known, calls = len(lowered.sizes), PackedWeights(), []
    original = weight_order.convolution
    monkeypatch.setattr(weight_order, "convolution", lambda *a: calls.append(a) or original(*a))
    for algorithm, new in ((0, lambda layer: True), (0, lambda layer: False), (2, lambda layer: layer.allows_winograd)):
        calls.clear()
        program(lowered, (algorithm,) * sections, (1,) * sections, False, known)
        assert len(calls) == sum(layer.kind == Kind.CONVOLUTION and new(layer) for layer in lowered.layers)


def test_cuda_has_one_algorithm_and_its_own_order(lowered: Lowered) -> None:
    made = cuda_program(lowered, torch.bfloat16, torch.device("cpu"))
    assert not any(column(made.steps, "winograd"))
    assert made.groups.tolist() == [1] * len(lowered.sizes)
    assert made.bfloat16
    layer, at = lowered.layers[0], column(made.steps, "packed")[0]
    packed = weight_order.fragments(layer.weight, layer.bias, True, torch.bfloat16)
    assert torch.equal(made.packed[at : at + len(packed)], packed)
