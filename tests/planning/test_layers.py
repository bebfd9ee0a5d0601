"""Layers made by hand: which of them change the size of maps, and what they compute, against PyTorch's modules."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images
from torch import nn

from eefast.ops import Activation, Kind
from eefast.planning.layers import Layer, Lowered, answers


@pytest.mark.parametrize(
    ("kind", "kernel", "stride", "padding", "resizes"),
    [
        (Kind.CONVOLUTION, 3, 1, 1, False),
        (Kind.CONVOLUTION, 1, 1, 0, False),
        (Kind.CONVOLUTION, 3, 2, 1, True),
        (Kind.CONVOLUTION, 3, 1, 0, True),
        (Kind.CONVOLUTION, 2, 1, 1, True),
        (Kind.MAX_POOL, 3, 1, 1, False),
        (Kind.MAX_POOL, 2, 2, 0, True),
        (Kind.AFFINE, 0, 1, 0, False),
        (Kind.EXIT, 0, 1, 0, False),
    ],
)
def test_windows_that_change_the_size(kind: Kind, kernel: int, stride: int, padding: int, resizes: bool) -> None:
    assert Layer(kind, 1, 2, kernel=kernel, stride=stride, padding=padding).resizes == resizes


WINOGRAD = Layer(Kind.CONVOLUTION, 1, 2, kernel=3, padding=1)


@pytest.mark.parametrize(
    ("layer", "possible"),
    [
        (WINOGRAD, True),
        (replace(WINOGRAD, source=0), False),
        (replace(WINOGRAD, stride=2), False),
        (replace(WINOGRAD, kernel=1, padding=0), False),
        (replace(WINOGRAD, padding=0), False),
        (replace(WINOGRAD, kind=Kind.MAX_POOL), False),
    ],
    ids=["3×3", "of the image", "stride 2", "1×1", "without padding", "max pooling"],
)
def test_what_winograd_can_compute(layer: Layer, possible: bool) -> None:
    assert layer.allows_winograd == possible
    assert layer.algorithm(4) == 4 * possible


def conv(source: int, target: int, module: nn.Conv2d, **more: Any) -> Layer:
    (kernel, _), (stride, _), (padding, _) = module.kernel_size, module.stride, module.padding  # type: ignore[misc]
    parts = {"kernel": kernel, "stride": stride, "padding": padding, "weight": module.weight, "bias": module.bias}
    return Layer(Kind.CONVOLUTION, source, target, **parts, **more)


def leave(source: int, index: int, weight: torch.Tensor, section: int = 0) -> Layer:
    return Layer(Kind.EXIT, source, index, weight=weight, bias=torch.arange(len(weight)) / 10, section=section)


@pytest.fixture(scope="module")
def parts() -> Any:
    """Two convolutions, scale and shift of four channels, rows of an exit."""
    torch.manual_seed(0)
    scale, shift = torch.randn(2, 4)
    return nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), scale, shift, torch.randn(6, 4)


@pytest.fixture(scope="module")
def lowered(parts: Any) -> Lowered:
    """Exit 1 before exit 0 in the order of the layers; a map that is used again; every kind of layer."""
    first, second, scale, shift, rows = parts
    layers = (
        conv(0, 1, first, activation=Activation.RELU),
        leave(1, 1, rows),
        conv(1, 2, second, residual=1),
        Layer(Kind.AFFINE, 2, 1, activation=Activation.RELU, weight=scale, bias=shift),
        Layer(Kind.MAX_POOL, 1, 2, kernel=2, stride=2, section=1),
        leave(2, 0, rows[:, :, None, None].expand(-1, -1, 2, 3), section=1),
    )
    return Lowered(layers, ((3, -1), (4, 0), (4, 0)), ((5, 6), (2, 3)))


@torch.no_grad()
def test_answers_are_those_of_pytorch_in_the_order_of_the_exits(parts: Any, lowered: Lowered) -> None:
    first, second, scale, shift, rows = parts
    x, bias = images(3, (3, 5, 6)), torch.arange(6) / 10
    y = first(x).relu()
    z = ((second(y) + y) * scale[:, None, None] + shift[:, None, None]).relu()
    pooled = nn.functional.max_pool2d(z, 2)
    last, early = answers(lowered, x)
    torch.testing.assert_close(early, y.mean((2, 3)) @ rows.T + bias)
    torch.testing.assert_close(last, pooled.sum((2, 3)) @ rows.T + bias)


def test_answers_are_computed_in_the_dtype_of_the_images(lowered: Lowered) -> None:
    assert {rows.dtype for rows in answers(lowered, images(2, (3, 5, 6)).double())} == {torch.float64}


def test_weights_follow_one_another_each_with_its_bias(lowered: Lowered) -> None:
    assert lowered.weights.numel() == sum(w.numel() for layer in lowered.layers for w in (layer.weight, layer.bias))
    first = lowered.layers[0]
    n = first.weight.numel()
    assert torch.equal(lowered.weights[:n], first.weight.flatten())
    assert torch.equal(lowered.weights[n : n + 4], first.bias)


def test_exit_sections(lowered: Lowered) -> None:
    assert lowered.exit_sections == (0, 1)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"weight": torch.ones(4, 3, 3, 3)}, True),
        ({"activation": Activation.NONE}, False),
        ({"stride": 2}, False),
        ({"section": 1}, False),
        ({"residual": 1}, False),
    ],
    ids=["weights", "relu", "stride", "section", "residual"],
)
def test_the_geometry_is_all_but_the_weights(lowered: Lowered, change: dict[str, Any], same: bool) -> None:
    first, *rest = lowered.layers
    other = replace(lowered, layers=(replace(first, **change), *rest))
    assert (other.geometry == lowered.geometry) == same
    assert (hash(other.geometry) == hash(lowered.geometry)) == same
    # Sizes of maps and the number of classes belong to it.
    assert replace(lowered, sizes=((5, 7), (2, 3))).geometry != lowered.geometry
    assert replace(lowered, layers=(*lowered.layers[:-1], leave(2, 0, torch.ones(7, 4)))).geometry != lowered.geometry
