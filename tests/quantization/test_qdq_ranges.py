"""Ranges beside the smallest and the largest values that hooks see; which convolutions stay in float32."""

import logging

import pytest
import torch
from networks import images, lived_in, one_by_one
from runtime_stages import stage
from torch import nn

import eefast
from eefast.heads import ExitHead
from eefast.qdq import QdqStage
from eefast.quantization.qdq_ranges import qdq_stages

SHAPE = (3, 12, 14)


def net_of(*stages, channels):
    sizes = [(12, 14)] + [(6, 7)] * (len(stages) - 1)
    heads = [ExitHead("pool", (c, *size), 4, SHAPE) for c, size in zip(channels, sizes, strict=True)]
    return lived_in(eefast.EarlyExitNet(stages, heads, input_shape=SHAPE), 0)


@pytest.fixture(scope="module")
def mobile():
    return net_of(nn.Sequential(stage("mobile"), nn.Conv2d(6, 3, 1)), stage("residual"), channels=(3, 4))


def values_seen(net, module, x):
    found = []
    handle = module.register_forward_hook(lambda m, inputs, output: found.append((inputs[0].clone(), output.clone())))
    with torch.no_grad():
        for part in x.split(7):
            net.all_exits(part)
    handle.remove()
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def test_ranges_reach_from_the_smallest_to_the_largest_value(mobile):
    x = images(21, SHAPE)
    read, returned = values_seen(mobile, mobile.stages[0][0][0], x)
    graph = qdq_stages(mobile, x.split(7), 100.0).stages[0].graph
    for values, part in ((read, graph.rounded_input_1), (returned, graph.rounded__0_0_0)):
        low, high = min(float(values.min()), 0), float(values.max())
        assert float(part.scale) == pytest.approx((high - low) / 255, rel=1e-5)
        assert int(part.zero) == round(-low / (high - low) * 255)


def test_gates_stay_in_float32(mobile):
    found = qdq_stages(mobile, images(21, SHAPE).split(7), 99.99)
    assert [len(names) for names in found.names] == [3, 2]
    assert found.left == 1
    left = [m for stage in found.stages for m in stage.modules() if isinstance(m, nn.Conv2d)]
    assert [tuple(conv.weight.shape) for conv in left] == [(6, 6, 1, 1)]


def test_a_convolution_that_loses_too_much_stays_in_float32():
    """What it reads is a thousandth of the range, so that it becomes 0."""
    scaled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 5, 1))
    net = net_of(scaled, channels=[5])
    with torch.no_grad():
        scaled[1].weight[0] = 1e5
        scaled[3].weight[:, 0] = 0
    found = qdq_stages(net, [images(16, SHAPE)], 100.0)
    assert [len(names) for names in found.names] == [1]
    assert found.left == 1


def test_without_any_convolution_there_is_nothing_to_gain():
    with pytest.raises(
        ValueError, match=r"no convolution that torch\.fx finds in the network keeps within 10% in INT8"
    ):
        qdq_stages(net_of(nn.SiLU(), channels=[3]), [images(16, SHAPE)], 99.99)


@torch.no_grad()
def test_quantize_makes_such_stages_where_the_resident_engine_lacks_layers(mobile, caplog):
    x = images(48, SHAPE)
    before = {name: value.clone() for name, value in mobile.state_dict().items()}
    with caplog.at_level(logging.INFO, "eefast"):
        made = eefast.quantize(mobile, x, torch.arange(48) % 4)
    assert "the stages in INT8 are for other libraries, since stages.0 has SiLU()" in caplog.text
    assert all(isinstance(stage, QdqStage) for stage in made.stages)
    assert all(torch.equal(value, before[name]) for name, value in mobile.state_dict().items())
    assert torch.equal(made.cost, mobile.cost)
    assert not made.training
    exact, found = mobile.all_exits(x), made.all_exits(x)
    for a, b in zip(exact, found, strict=True):
        assert 0 < float((a.logits - b.logits).norm() / a.logits.norm()) < 0.05
    alone = one_by_one(made, x[:9])
    assert torch.equal(made(x[:9]).exit_index, alone.exit_index)
    with pytest.raises(ValueError, match="net is quantised already"):
        eefast.quantize(made, x)
    with pytest.raises(ValueError, match="a quantised network keeps its exits"):
        made.without_exits([0])
    with pytest.raises(ValueError, match="was built from modules, quantised, so that"):
        made.check_saving()
