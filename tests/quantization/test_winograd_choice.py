"""Which map sizes F(2, 3) computes, on networks whose errors are known."""

from collections import namedtuple

import pytest
import torch
from networks import images, lived_in

import eefast
from eefast.modules.integer_maps import exact_winograd_inputs, winograd_inputs
from eefast.quantization.float_layers import float_stages
from eefast.quantization.integer_steps import quantized_stage
from eefast.quantization.ranges import observe
from eefast.quantization.winograd_choice import chosen_sizes, logit_error, merged, winograd_layers

Output = namedtuple("Output", "logits")
LARGE, MIDDLE, SMALL = (32, 32), (16, 16), (8, 8)


class Known:
    """A network with logits that have a known relative error at both of its exits."""

    def __init__(self, error=0.0):
        self.error = error

    def all_exits(self, x):
        sign = torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)
        logits = torch.stack([sign, -sign], 1)  # of deviation 1
        return [Output(logits * (1 + self.error)), Output(5 + 3 * logits * (1 - self.error))]


@pytest.mark.parametrize(
    ("direct", "large", "middle", "small", "expected"),
    [
        (0.01, 0.02, 0.02, 0.00, [LARGE, MIDDLE, SMALL]),
        (0.01, 0.02, 0.03, 0.01, [LARGE, SMALL]),
        (0.01, 0.05, 0.01, 0.01, [MIDDLE, SMALL]),
        (0.01, 0.05, 0.04, 0.05, [MIDDLE]),
        (0.01, 0.09, 0.09, 0.09, []),
        (0.20, 0.02, 0.01, 0.01, [LARGE, MIDDLE, SMALL]),
        (0.20, 0.04, 0.02, 0.01, [MIDDLE, SMALL]),
    ],
)
def test_sizes_go_until_the_bound_is_kept(direct, large, middle, small, expected):
    more = {LARGE: large, MIDDLE: middle, SMALL: small}

    def built(sizes):
        return Known(direct + sum(more[size] for size in sizes))

    assert chosen_sizes(list(more), built, Known(), torch.zeros(40, 1, 1, 1).split(7)) == expected


def test_without_a_size_there_is_nothing_to_choose():
    assert chosen_sizes([], lambda sizes: Known(), Known(), torch.zeros(40, 1, 1, 1).split(7)) == []


def test_the_error_is_relative_to_each_exits_deviation():
    expected = (
        torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100])[:, None, None]
    )
    expected -= expected.mean((1, 2), keepdim=True)
    found = expected * torch.tensor([1.03, 0.96])[:, None, None]
    assert logit_error(found, expected) == pytest.approx((0.5 * (0.03**2 + 0.04**2)) ** 0.5, rel=1e-4)
    assert logit_error(expected, torch.zeros_like(expected)) > 1


def test_layers_are_found_by_size_with_their_mean_excess():
    net = lived_in(eefast.zoo.eenet("eenet20", 1, (2,), "conv1", 3, (3, 13, 7)), seed=0)
    x = images(5, (3, 13, 7))
    layers = float_stages(net)
    ranges, image = observe(net, layers, x.split(2), 100)
    stages = [quantized_stage(stage, r, image, {}) for stage, r in zip(layers, ranges, strict=True)]
    found = winograd_layers(layers, ranges, stages, x.split(2))
    # The 18 layers in blocks without the two of stride 2, and one in the head.
    counts = {size: sum(map(len, of_size.values())) for size, of_size in found.items()}
    assert counts == {(13, 7): 7, (7, 4): 5, (4, 2): 5}
    some = merged(found, [(13, 7), (4, 2)])
    assert sum(map(len, some.values())) == 7 + 5
    assert all(torch.equal(some[s][i], e) for s, of_stage in found[4, 2].items() for i, e in of_stage.items())
    source = stages[0].integers(stages[0].input_integers(x))[layers[0].layers[1].source]
    rounded, exact = winograd_inputs(source), exact_winograd_inputs(source)
    mean = torch.stack([(a - b).mean((0, 2, 3)) for a, b in zip(rounded, exact, strict=True)], 1)
    torch.testing.assert_close(found[13, 7][0][1].float(), mean)
    assert not torch.allclose(mean, torch.full((), 0.25), atol=0.01)
