"""Scales and zero points of maps and images, beside the definition: (q - zero) · scale covers what was observed."""

import pytest
import torch
from networks import images, lived_in

from eefast import zoo
from eefast.ops import Kind
from eefast.quantization.float_layers import float_stages
from eefast.quantization.observers import PercentileObserver
from eefast.quantization.ranges import observe, scale_and_zero


def observed(*values: float, percentile: float = 100.0) -> PercentileObserver:
    observer = PercentileObserver(percentile, 1)
    observer.observe(torch.tensor(values).view(1, 1, 1, -1))
    return observer


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("values", [(0.0, 3.0), (-1.0, 2.0), (-5.0, 0.0), (1.0, 2.0), (-2e-3, 700.0)])
def test_the_integers_cover_what_was_observed(values, relu):
    scale, zero = scale_and_zero(observed(*values), relu)
    low, high = (0 - zero) * scale, (255 - zero) * scale
    wanted_low, wanted_high = 0.0 if relu else min(*values, 0.0), max(*values, 0.0)
    if wanted_low == wanted_high:  # a ReLU of negative values
        assert (scale, zero) == (1 / 255, 0)
        return
    assert low == pytest.approx(wanted_low, abs=scale / 2 + 1e-6)
    assert high == pytest.approx(wanted_high, abs=scale / 2 + 1e-6)
    assert 0 <= zero <= 255
    assert zero == 0 or not relu


def test_a_percentile_cuts_off_the_largest_values():
    scale, _ = scale_and_zero(observed(*[1.0] * 999, 1000.0, percentile=99.0), relu=True)
    assert scale == pytest.approx(1 / 255)


@pytest.mark.parametrize(("values", "relu"), [([0.0] * 5, True), ([0.0] * 5, False), ([0.0] * 99999 + [2.0], True)])
def test_maps_of_nearly_nothing_but_zeros(values, relu):
    """Where the percentile says that all is zero, the values that are not count."""
    scale, zero = scale_and_zero(observed(*values, percentile=99.0), relu)
    assert scale == pytest.approx((max(values) or 1.0) / 255)
    assert zero == 0


@pytest.fixture(scope="module", params=[None, ((0.4, 0.5, 0.45), (0.25, 0.2, 0.3))], ids=["floats", "normalised"])
def found(request):
    net = zoo.eenet("eenet8", input_shape=(3, 13, 11), normalization=request.param)
    x = images(20, net.input_shape, 1)
    stages = float_stages(lived_in(net, 1))
    return net, x, stages, *observe(net, stages, x.split(7), 100.0)


def test_stages_begin_with_the_scale_of_the_stage_before(found):
    _, _, stages, ranges, _ = found
    last = None
    for stage, r in zip(stages, ranges, strict=True):
        assert len(r.scales) == len(r.zeros) == len(stage.layers) + 1
        if last is not None:
            assert (r.scales[0], r.zeros[0]) == last
        if not stage.head:
            last = r.scales[stage.output], r.zeros[stage.output]


def test_every_value_is_covered_and_poolings_keep_their_scale(found):
    _, x, stages, ranges, _ = found
    for stage, r in zip(stages, ranges, strict=True):
        values = stage.values(x)
        for layer in stage.layers:
            scale, zero = r.scales[layer.target], r.zeros[layer.target]
            if layer.kind == Kind.MAX_POOL:
                assert (scale, zero) == (r.scales[layer.source], r.zeros[layer.source])
            integers = values[layer.target] / scale + zero
            assert integers.min() > -0.51
            assert 254.4 < integers.max() < 255.6 or layer.kind == Kind.MAX_POOL or zero > 0
            assert zero == 0 or not layer.activation
        x = x if stage.head else values[stage.output]


def test_integers_of_images(found):
    net, x, _, _, (multiplier, shift) = found
    if net.normalization is None:
        integers = x * multiplier[0] + shift[0]
        assert -0.51 < integers.min() < 0.51
        assert 254.4 < integers.max() < 255.6
        assert shift.unique().numel() == 1
        assert shift[0] == shift[0].round()  # zero is an integer
        return
    pixels = torch.randint(0, 256, (2, 3, 13, 11), dtype=torch.uint8)
    integers = net.prepare(pixels) * multiplier[:, None, None] + shift[:, None, None]
    torch.testing.assert_close(integers, pixels.float(), atol=1e-3, rtol=0)
