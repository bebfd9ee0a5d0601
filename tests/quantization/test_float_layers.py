"""Layers of stages beside the modules that they were made of."""

import pytest
import torch
from networks import Stage, images, lived_in
from torch import nn
from torch.nn import functional as F

import eefast
from eefast.heads import ExitHead
from eefast.quantization.float_layers import float_stages

SHAPE = (3, 13, 7)


def net_of(*stages, channels=5):
    heads = [ExitHead("pool", (channels, 13, 7), 4, SHAPE) for _ in stages]
    return lived_in(eefast.EarlyExitNet(stages, heads, input_shape=SHAPE), seed=0)


def conv(inputs=5, outputs=5):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def both(m, x):
    y = m.a(x)
    return y + m.b(F.relu(y))


STAGES = {
    "a ReLU that the next stage begins with": (conv(3), nn.Sequential(nn.ReLU(), conv(), nn.BatchNorm2d(5))),
    "a ReLU inside of a stage that returns its input": (Stage(both, a=conv(3), b=conv()), conv()),
    "a residual that is the stage's input": (conv(3), Stage(lambda m, x: F.relu(x + m.a(x)), a=conv())),
    "a stage that does nothing": (conv(3), nn.Identity(), conv()),
    "a BatchNorm alone": (nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(5)), nn.BatchNorm2d(5)),
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=STAGES)
@torch.no_grad()
def test_layers_compute_what_the_stages_compute(stages):
    net, x = net_of(*stages), images(3, SHAPE)
    for described, stage in zip(float_stages(net), net.stages, strict=True):
        assert [layer.target for layer in described.layers] == list(range(1, len(described.layers) + 1))
        assert all(max(layer.source, layer.residual) < layer.target for layer in described.layers)
        found, x = described.values(x)[described.output], stage(x.clone())
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_convolutions_of_heads_follow_their_stages():
    net = lived_in(eefast.zoo.eenet("eenet20", 2, (1, 2), "conv2", 4, SHAPE), seed=0)
    described = float_stages(net)
    assert [stage.path for stage in described] == [
        *("stages.0", "heads.0.convs", "stages.1", "heads.1.convs", "stages.2"),
    ]
    x = net.stages[0](images(3, SHAPE))
    head = described[1]
    assert (head.exit_index, head.head, head.image, len(head.layers)) == (0, True, False, 2)
    torch.testing.assert_close(head.values(x)[head.output], net.heads[0].convs(x), rtol=1e-4, atol=1e-4)
