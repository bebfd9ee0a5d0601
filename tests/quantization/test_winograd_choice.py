"""Which algorithm computes which map size, on networks whose errors are known."""

from collections import namedtuple

import pytest
import torch
from networks import images, lived_in

import eefast
from eefast.modules.integer_maps import exact_winograd_inputs, winograd_inputs
from eefast.quantization.float_layers import float_stages
from eefast.quantization.integer_steps import quantized_stage
from eefast.quantization.ranges import observe
from eefast.quantization.winograd_choice import chosen, coarsest, logit_error, merged, winograd_layers

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
    ("direct", "errors", "expected"),
    [
        (0.01, {LARGE: (0.01, 0.02), MIDDLE: (0.01, 0.02), SMALL: (0, 0)}, (2, 2, 2)),
        (0.01, {LARGE: (0.01, 0.015), MIDDLE: (0.02, 0.03), SMALL: (0.01, 0.01)}, (2, 0, 2)),
        (0.01, {LARGE: (0.01, 0.04), MIDDLE: (0.01, 0.02), SMALL: (0.01, 0.01)}, (1, 2, 2)),
        (0.01, {LARGE: (0.01, 0.04), MIDDLE: (0.01, 0.03), SMALL: (0.01, 0.02)}, (1, 1, 2)),
        (0.01, {LARGE: (0.05, 0.06), MIDDLE: (0.01, 0.01), SMALL: (0.01, 0.01)}, (0, 2, 2)),
        (0.01, {LARGE: (0.09, 0.10), MIDDLE: (0.09, 0.10), SMALL: (0.09, 0.10)}, (0, 0, 0)),
        (0.20, {LARGE: (0.01, 0.02), MIDDLE: (0.01, 0.02), SMALL: (0.01, 0.01)}, (2, 2, 2)),
        (0.20, {LARGE: (0.02, 0.04), MIDDLE: (0.01, 0.02), SMALL: (0.01, 0.01)}, (1, 2, 2)),
    ],
)
def test_the_worst_size_gets_finer_until_the_bound_is_kept(direct, errors, expected):
    """errors: what F(2, 3) and F(2×2) add to those of direct sums; the bound is 0.05, or 0.25 of 0.20."""

    def built(choice):
        return Known(direct + sum(errors[size][winograd - 1] for size, winograd in choice.items() if winograd))

    found = chosen(dict.fromkeys(errors, 2), built, Known(), torch.zeros(40, 1, 1, 1).split(7))
    assert found == dict(zip(errors, expected, strict=True))


def test_no_network_is_tried_twice():
    tried = []

    def built(choice):
        tried.append(tuple(sorted(choice.items())))
        return Known(0.01 + 0.04 * sum(choice.values()))

    coarse = dict.fromkeys((LARGE, MIDDLE, SMALL), 2)
    assert chosen(coarse, built, Known(), torch.zeros(40, 1, 1, 1).split(7)) == {LARGE: 0, MIDDLE: 0, SMALL: 1}
    assert len(tried) == len(set(tried)) <= 2 + 4 * len(coarse)


def test_without_a_size_there_is_nothing_to_choose():
    assert chosen({}, lambda choice: Known(), Known(), torch.zeros(40, 1, 1, 1).split(7)) == {}


@pytest.mark.parametrize(
    ("size", "expected"),
    [((8, 8), (0, 1, 2)), ((1, 8), (0, 1, 1)), ((1, 1), (0, 0, 0)), ((2, 2), (0, 1, 2)), ((3, 5), (0, 1, 2))],
    ids=str,
)
def test_the_coarsest_algorithm_takes_the_fewest_products(size, expected):
    height, width = size
    columns, rows = -(-width // 2), -(-height // 2)
    products = [9 * height * width, 12 * height * columns, 16 * rows * columns]
    for allowed in (0, 1, 2):
        found = coarsest(size, allowed)
        assert found == expected[allowed]
        assert products[found] == min(products[: allowed + 1])


def test_the_error_is_relative_to_each_exits_deviation():
    expected = (
        torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100])[:, None, None]
    )
    expected -= expected.mean((1, 2), keepdim=True)
    found = expected * torch.tensor([1.03, 0.96])[:, None, None]
    assert logit_error(found, expected) == pytest.approx((0.5 * (0.03**2 + 0.04**2)) ** 0.5, rel=1e-4)
    assert logit_error(expected, torch.zeros_like(expected)) > 1


@pytest.mark.parametrize("winograd", [1, 2])
def test_layers_are_found_by_size_with_their_mean_excess(winograd):
    net = lived_in(eefast.zoo.eenet("eenet20", 1, (2,), "conv1", 3, (3, 13, 7)), seed=0)
    x = images(5, (3, 13, 7))
    layers = float_stages(net)
    ranges, image = observe(net, layers, x.split(2), 100)
    stages = [quantized_stage(stage, r, image, {}) for stage, r in zip(layers, ranges, strict=True)]
    found = winograd_layers(layers, ranges, stages, x.split(2), winograd)
    # The 18 layers in blocks without the two of stride 2, and one in the head.
    counts = {size: sum(map(len, of_size.values())) for size, of_size in found.items()}
    assert counts == {(13, 7): 7, (7, 4): 5, (4, 2): 5}
    some = merged({size: found[size] for size in ((13, 7), (4, 2))})
    assert sum(map(len, some.values())) == 7 + 5
    assert all(torch.equal(some[s][i], e) for s, of_stage in found[4, 2].items() for i, e in of_stage.items())
    source = stages[0].integers(stages[0].input_integers(x))[layers[0].layers[1].source]
    added = winograd_inputs(source, winograd) - exact_winograd_inputs(source, winograd)
    mean = torch.stack([part.flatten(2).mean((0, 2)) for part in added.flatten(0, -5)], 1)
    torch.testing.assert_close(found[13, 7][0][1].float(), mean.view(-1, *(4,) * winograd))
    assert not torch.allclose(mean, torch.full((), 0.25 * winograd), atol=0.01)
