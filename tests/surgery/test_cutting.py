"""Backbones cut after their exits: every end is kept, stages share nothing but their features."""

from __future__ import annotations

import pytest
import torch
from custom_backbones import SMALL, assert_answers_of, make
from networks import assert_same_answers, images, one_by_one, spread_thresholds
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet

import eefast
from eefast.surgery.attachment import attach

ENDS = {
    "fixed window": lambda m, x: m.fc(F.avg_pool2d(m.third(m.second(m.first(x))), (8, 7)).view(x.size(0), -1)),
    "batch size from its shape": lambda m, x: m.fc(m.pool(m.third(m.second(m.first(x)))).reshape(x.shape[0], 8)),
    "mean": lambda m, x: m.fc(m.third(m.second(m.first(x))).mean([-2, -1])),
    "one map, unpooled": lambda m, x: m.fc(m.third(m.second(m.first(x)))[:, :, 0, 0]),
    "maximum": lambda m, x: m.fc(F.adaptive_max_pool2d(m.third(m.second(m.first(x))), 1).flatten(1)),
    "activation after the mean": lambda m, x: m.fc(torch.tanh(m.pool(m.third(m.second(m.first(x))))).flatten(1)),
    "norm after the mean": lambda m, x: m.fc(m.extra(m.pool(m.third(m.second(m.first(x)))).flatten(1))),
    "two linears": lambda m, x: m.fc(m.relu(m.extra2(m.third(m.second(m.first(x))).view(-1, 8 * 56)))),
}


@pytest.mark.parametrize("end", ENDS)
def test_every_end_is_kept(end):
    backbone = make(ENDS[end], extra=nn.BatchNorm1d(8, affine=False), extra2=nn.Linear(8 * 56, 8))
    net = attach(backbone, ["first"], input_shape=SMALL)
    x = images(33, SMALL)
    assert_answers_of(net, backbone, x)
    assert (net.heads[-1].feature_shape == (8, 8, 7)) == (end in ("batch size from its shape", "mean"))
    spread_thresholds(net, x, 0.4)
    assert_same_answers(eefast.accelerate(net, engine="compact")(x), one_by_one(net, x), net)


def test_heads_get_their_gradients_where_the_next_stage_works_in_place():
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        backbone = make(relu=nn.ReLU(inplace=inplace))
        net = attach(backbone, ["norm"], head="conv1", input_shape=SMALL).train()
        sum(out.logits.square().sum() for out in net(images(3, SMALL))).backward()
        gradients.append([p.grad for _, p in net.named_parameters() if p.grad is not None])
        assert_answers_of(net, backbone, images(3, SMALL))
    assert len(gradients[0]) == len(list(net.parameters())) - 4, "all but the two confidence rows"
    assert all(map(torch.equal, *gradients))


RESNET = ResNet(BasicBlock, [1, 2, 1, 1], num_classes=7)


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["layer2", "layer1"], r"order in which they run; write exits=\['layer1', 'layer2'\]"),
        (["layer2.1", "layer2"], "'layer2.1' is at the same place as another exit"),
        (["layer1", "layer1"], "'layer1' is at the same place as another exit"),
        (
            ["layer2.0.conv1"],
            "after 'layer2.0.conv1' the backbone still needs what 'layer1' returned; take 'layer2.0'",
        ),
        (["layer2.0.downsample"], "after 'layer2.0.downsample' .* what 'layer2.0.bn2' returned; take 'layer2.0'"),
        (["layer4"], "after what 'layer4' returned only the classifier has weights"),
        (["avgpool"], "after what 'avgpool' returned only the classifier has weights"),
    ],
)
def test_places_where_no_cut_can_be(exits, message):
    with pytest.raises(ValueError, match=message):
        attach(RESNET, exits, input_shape=(3, 32, 32))
