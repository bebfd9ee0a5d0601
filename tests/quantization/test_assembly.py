"""The network that quantised stages are put into: what it has of the float network, heads of every kind."""

import pytest
import torch
from networks import images, lived_in
from torch import nn

from eefast import rules, zoo
from eefast.heads import HEADS
from eefast.quantization.assembly import assembled, with_qdq_stages
from eefast.quantization.float_layers import float_stages
from eefast.quantization.integer_steps import quantized_stage
from eefast.quantization.ranges import observe
from eefast.quantized import QuantizedStage

SHAPE = (3, 13, 11)


def made_of(net):
    layers = float_stages(net)
    ranges, image = observe(net, layers, [images(16, SHAPE, 1)], 99.99)
    stages = [quantized_stage(stage, r, image, {}) for stage, r in zip(layers, ranges, strict=True)]
    return assembled(net, layers, stages), stages


# Plain heads need maps of the image's size.
@pytest.mark.parametrize("head", [head for head in HEADS if head != "plain"])
def test_what_stays_of_the_float_network(head):
    net = lived_in(zoo.eenet("eenet8", input_shape=SHAPE, head=head), 1)
    net.thresholds.fill_(0.375)
    net = net.with_criterion("entropy", [0.25, 0.5])
    made, stages = made_of(net)
    assert not made.training
    assert not any(p.requires_grad for p in made.parameters())
    assert made.criterion.name == "entropy"
    assert made.thresholds.tolist() == [0.25, 0.5]
    assert made.config["float_thresholds"] == {"entropy": [0.25, 0.5]}
    assert torch.equal(made.cost, net.cost)
    assert [head.kind for head in made.heads] == [h.kind for h in net.heads]
    used = [m for m in made.modules() if isinstance(m, QuantizedStage)]
    assert {id(m) for m in used} == {id(m) for m in stages}
    for new, old in zip(made.heads, net.heads, strict=True):
        assert new.classifier is not old.classifier
        assert torch.equal(new.classifier.weight, old.classifier.weight)
        assert torch.equal(new.confidence.bias, old.confidence.bias)
        assert isinstance(new.norm, nn.BatchNorm2d) == isinstance(old.norm, nn.BatchNorm2d)
    x = images(5, SHAPE, 2)
    for found, wanted in zip(made.all_exits(x), net.all_exits(x), strict=True):
        spread = wanted.logits.std()
        assert (found.logits - wanted.logits).abs().max() < 0.3 * spread


@pytest.mark.parametrize("rule", [rules.vote([3.0, 1.0, 1.0]), rules.carried([0.0, 0.3, 0.7])], ids=["vote", "carried"])
def test_the_exit_rule_goes_with_stages_of_other_libraries(rule):
    net = lived_in(zoo.eenet("eenet8", input_shape=SHAPE), 1).with_criterion(rule, [0.25, 0.5])
    assert with_qdq_stages(net, list(net.stages), None).exit_rule == rule


@torch.no_grad()
def test_linears_without_a_bias_and_norms_without_weights():
    net = lived_in(zoo.eenet("eenet8", input_shape=SHAPE, head="bnpool"), 1)
    head = net.heads[0]
    head.classifier.bias = None
    norm = head.norm
    head.norm = nn.BatchNorm2d(norm.num_features, affine=False, eps=1e-3).eval()
    head.norm.running_mean.copy_(norm.running_mean)
    head.norm.running_var.copy_(norm.running_var)
    made, _ = made_of(net)
    new = made.heads[0]
    assert new.classifier.bias.count_nonzero() == 0
    assert new.norm.eps == 1e-3
    features = images(3, head.feature_shape, 4)
    torch.testing.assert_close(new(features).logits, head(features).logits)
