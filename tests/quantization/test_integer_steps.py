"""Layers in integers beside the same layers in float64 on what the integers stand for."""

import pytest
import torch
from torch.nn import functional as F

from eefast.modules import integer_maps
from eefast.ops import Activation, Kind
from eefast.planning.layers import Layer
from eefast.quantization.float_layers import FloatStage
from eefast.quantization.integer_steps import can_use_winograd, quantized_stage
from eefast.quantization.ranges import Ranges

IMAGE = torch.tensor([[50.0], [120.25]])


def layer(outputs, inputs, kernel=3, seed=0, residual=-1, source=0, target=1, size=1.0, **more):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator) * size / (inputs * kernel**2) ** 0.5
    bias = torch.randn(outputs, generator=generator) * size
    return Layer(
        Kind.CONVOLUTION, source, target, residual, kernel=kernel, weight=weight, bias=bias, **{"padding": 1, **more}
    )


def stage_of(*layers, image=False):
    return FloatStage(list(layers), layers[-1].target, "stages.0", 0 if image else 1, head=False)


def integers(channels, size, n=2, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, *size), generator=generator).float()


def real(q, ranges, value):
    return (q.double() - ranges.zeros[value]) * ranges.scales[value]


def steps_off(found, expected, ranges, value):
    """Differences from the real values `expected`, in steps of the map's scale; what the map cannot hold is cut off."""
    low, high = (real(torch.tensor(end), ranges, value) for end in (0, 255))
    return (real(found, ranges, value) - expected.clamp(low, high)).abs() / ranges.scales[value]


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 3), (3, 1), (5, 17), (17, 5), (65, 3)])
@pytest.mark.parametrize(
    ("zero_in", "zero_out", "relu", "stride"),
    [(0, 0, True, 1), (90, 0, True, 2), (0, 128, False, 2), (255, 77, False, 1)],
)
def test_a_convolution_is_off_by_its_rounding_only(inputs, outputs, zero_in, zero_out, relu, stride):
    described = layer(outputs, inputs, activation=Activation(relu), stride=stride)
    ranges = Ranges([0.02, 0.05], [zero_in, zero_out])
    q = integers(inputs, (5, 7))
    stage = quantized_stage(stage_of(described), ranges, IMAGE, {})
    x = real(q, ranges, 0)
    # With the weights that the integers stand for nothing is left but the rounding of the bias and of the result.
    step = stage.steps[0]
    weight = step.weight.double() * (step.scale.double() * 0.05 / 0.02)[:, None, None, None]
    expected = F.conv2d(x, weight, described.bias.double(), stride, 1)
    assert steps_off(stage.integers(q)[1], expected, ranges, 1).max() <= 0.5 + 0.5 * float(step.scale.max()) + 1e-3
    coarse = (weight - described.weight.double()).abs().flatten(1).amax(1)
    assert (coarse <= described.weight.abs().flatten(1).amax(1).double() / 127 / 2 * 1.001).all()


@pytest.mark.parametrize("channels", [1, 5, 17])
@pytest.mark.parametrize("size", [(5, 7), (1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("winograd", [1, 2])
def test_winograd_is_near_the_convolution(winograd, channels, size):
    described = layer(3, channels, activation=Activation.RELU)
    ranges = Ranges([0.02, 0.02], [0, 0])
    q = integers(channels, size, n=64)
    x = real(q, ranges, 0)
    excess = integer_maps.winograd_inputs(q, winograd) - integer_maps.exact_winograd_inputs(q, winograd)
    excess = excess.double().transpose(-4, -3).flatten(-3).mean(-1).movedim(-1, 0)  # over all but frequencies, channels
    found = quantized_stage(stage_of(described), ranges, IMAGE, {0: excess}).integers(q)[1]
    expected = F.conv2d(x, described.weight.double(), described.bias.double(), padding=1).relu()
    error = real(found, ranges, 1) - expected.clamp_max(255 * 0.02)
    # Weights have 1/127 of the largest, inputs one bit less; the mean is right where the excess is calibrated.
    assert error.square().mean().sqrt() < 0.03 * winograd * x.square().mean().sqrt()
    assert error.mean().abs() < 0.02


@pytest.mark.parametrize("winograd", [1, 2])
def test_winograd_rows_of_bias_have_equal_parity(winograd):
    """Of even and odd columns, or of the even and the odd row in either of these."""
    excess = torch.rand(5, *(4,) * winograd)
    stage = quantized_stage(stage_of(layer(64, 5)), Ranges([0.02, 0.05], [0, 128]), IMAGE, {0: excess})
    bias = stage.steps[0].bias
    assert bias.shape == (2 * winograd, 64)
    for even, odd in zip(bias[:winograd], bias[winograd:], strict=True):
        assert (even != odd).any()
        assert ((even - odd) % 2 == 0).all()


@pytest.mark.parametrize(
    ("zeros", "winograd"),
    [((0, 0, 0), 0), ((0, 100, 30), 0), ((60, 0, 200), 0), *(((x, 0, 3 * x), w) for x in (0, 60) for w in (1, 2))],
)
def test_a_residual_is_added_with_its_zero_point(zeros, winograd):
    first = layer(5, 5, kernel=1, padding=0)
    second = layer(5, 5, seed=1, source=1, target=2, residual=0, size=0.2)
    ranges = Ranges([0.03, 0.02, 0.05], list(zeros))
    q = integers(5, (5, 7))
    more = {1: torch.full((5, *(4,) * winograd), 0.25)} if winograd else {}
    stage = quantized_stage(stage_of(first, second), ranges, IMAGE, more)
    values = stage.integers(q)
    sums = F.conv2d(real(values[1], ranges, 1), second.weight.double(), second.bias.double(), padding=1)
    off = steps_off(values[2], sums + real(q, ranges, 0), ranges, 2)
    assert off.max() <= (1.5, 4, 8)[winograd]
    assert off.mean() <= (0.4, 0.6, 1.5)[winograd]


def test_the_image_has_its_shift_in_the_bias():
    described = layer(7, 1, activation=Activation.RELU)
    ranges = Ranges([1.0, 0.02], [0, 0])
    stage = quantized_stage(stage_of(described, image=True), ranges, IMAGE, {})
    x = torch.randn(2, 1, 5, 7)
    q = stage.input_integers(x)
    held = (q.double() - IMAGE[1].double()) / IMAGE[0].double()
    edge = (integer_maps.image_fill(IMAGE[1]).double() - IMAGE[1].double()) / IMAGE[0].double()
    wide = F.pad(held, (1,) * 4, value=float(edge))
    step = stage.steps[0]
    weight = step.weight.double() * step.scale.double()[:, None, None, None] * 0.02 * IMAGE[0].double()
    expected = F.conv2d(wide, weight, described.bias.double()).relu()
    assert steps_off(stage.integers(q)[1], expected, ranges, 1).max() <= 0.5 + 0.5 * float(step.scale.max()) + 1e-3


@pytest.mark.parametrize("zeros", [(0, 0), (30, 200), (255, 0)], ids=str)
def test_an_affine_layer(zeros):
    scale, shift = torch.tensor([0.5, 3.0, -2.0]), torch.tensor([0.1, -2.0, 3.0])
    described = Layer(Kind.AFFINE, 0, 1, activation=Activation(zeros[1] == 0), weight=scale, bias=shift)
    ranges = Ranges([0.03, 0.05], list(zeros))
    q = integers(3, (5, 7))
    found = quantized_stage(stage_of(described), ranges, IMAGE, {}).integers(q)[1]
    expected = real(q, ranges, 0) * scale[:, None, None] + shift[:, None, None]
    assert steps_off(found, expected, ranges, 1).max() <= 0.51


@pytest.mark.parametrize("bias", [0.0, 1e-12, 1.0, 1e4], ids=str)
@pytest.mark.parametrize("weight", [0.0, 1e-30, 1.0], ids=str)
@pytest.mark.parametrize("winograd", [0, 1, 2])
def test_extreme_weights_keep_sums_in_32_bits(bias, weight, winograd):
    described = layer(3, 5, size=weight)
    described.bias = torch.tensor([bias, -bias, 0.0])
    q = integers(5, (5, 7))
    expected = F.conv2d(0.02 * q.double(), described.weight.double(), described.bias.double(), padding=1)
    ranges = Ranges([0.02, float(expected.abs().max()) / 100 or 1 / 255], [0, 128])
    more = {0: torch.full((5, *(4,) * winograd), 0.25)} if winograd else {}
    stage = quantized_stage(stage_of(described), ranges, IMAGE, more)
    step = stage.steps[0]
    assert (integer_maps.largest_sums(step.weight, step.bias, winograd) < 2**31).all()
    assert steps_off(stage.integers(q)[1], expected, ranges, 1).max() <= (1, 4, 8)[winograd]


def test_what_does_not_fit_names_the_layer():
    described = layer(1, 9000, kernel=3)
    described.weight = torch.ones(1, 9000, 3, 3)
    with pytest.raises(ValueError, match=r"layer 0 of stages\.0 cannot be quantised: sums over 9000 channels"):
        quantized_stage(stage_of(described), Ranges([0.02, 0.05], [0, 0]), IMAGE, {})
    with pytest.raises(ValueError, match="weights are too large"):
        quantized_stage(stage_of(layer(1, 1, size=1e38)), Ranges([1e3, 1e-3], [0, 0]), IMAGE, {})


@pytest.mark.parametrize(
    ("change", "zero", "image", "expected"),
    [
        ({}, 0, False, True),
        ({}, 1, False, False),
        ({}, 0, True, False),
        ({"stride": 2}, 0, False, False),
        ({"padding": 0}, 0, False, False),
        ({"kernel": 1, "padding": 0}, 0, False, False),
        ({"kernel": 5, "padding": 2}, 0, False, False),
    ],
)
def test_where_winograd_is_possible(change, zero, image, expected):
    described = layer(3, 5, **change)
    stage, ranges = stage_of(described, image=image), Ranges([1.0, 1.0], [zero, 0])
    assert can_use_winograd(stage, ranges, described) == expected
