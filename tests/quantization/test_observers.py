"""Ranges beside NumPy's of all values at once."""

import numpy as np
import pytest
import torch

from eefast.quantization.observers import MinMaxObserver, PercentileObserver, PerChannelMinMaxObserver
from eefast.quantization.ranges import scale_and_zero


def batches(images=23, shape=(3, 5, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(images, *shape, generator=generator) * 3 + 1).split(5)


@pytest.mark.parametrize("percentile", [100, 99.9, 99, 90])
@pytest.mark.parametrize("relu", [False, True])
def test_percentiles_are_those_of_all_values(percentile, relu):
    seen = [x.relu() if relu else x for x in batches()]
    observer = PercentileObserver(percentile, 23)
    for x in seen:
        observer.observe(x)
    values = np.sort(torch.cat(seen).flatten().numpy())
    beyond = int(len(values) // 23 * 23 * (1 - percentile / 100))
    assert observer.bounds() == (values[0 if relu else beyond], values[-1 - beyond])


def test_smallest_and_largest():
    observer = MinMaxObserver()
    for x in batches():
        observer.observe(x)
    whole = torch.cat(batches())
    assert observer.bounds() == (float(whole.min()), float(whole.max()))


def test_the_largest_magnitude_of_every_channel():
    observer = PerChannelMinMaxObserver()
    observer.observe(torch.tensor([[[[1.0, -3]]], [[[0, 0]]], [[[2, 0.5]]]]))
    assert observer.max_val.tolist() == [3, 0, 2]


@pytest.mark.parametrize(
    ("low", "high", "relu", "expected"),
    [
        (0.0, 51.0, True, (0.2, 0)),
        (-25.5, 25.5, False, (0.2, 128)),
        (-51.0, 0.0, False, (0.2, 255)),
        (-51.0, -5.0, False, (0.2, 255)),  # pixels outside of the map are 0, which an integer must stand for
        (5.0, 51.0, False, (0.2, 0)),
        (0.0, 0.0, True, (1 / 255, 0)),
        (-1e-44, 1e-44, False, (1 / 255, 0)),
        (0.0, 2.55e30, True, (1e28, 0)),
    ],
)
def test_scale_and_zero(low, high, relu, expected):
    observer = PercentileObserver(100, 2)
    observer.observe(torch.tensor([[low], [high]]))
    scale, zero = scale_and_zero(observer, relu)
    assert scale == pytest.approx(expected[0], rel=1e-5)
    assert zero == expected[1]


def test_a_map_that_is_nearly_always_zero_gets_the_range_of_the_rest():
    observer = PercentileObserver(99, 2)
    x = torch.zeros(2, 1000)
    x[0, 3] = 5.1
    observer.observe(x)
    assert scale_and_zero(observer, True) == (pytest.approx(0.02), 0)
