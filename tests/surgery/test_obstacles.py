"""Backbones and names that cannot be used are refused before any work, with the way out."""

from __future__ import annotations

import pytest
import torch
from custom_backbones import SMALL, Custom, make
from networks import images
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models.resnet import BasicBlock, ResNet

import eefast
from eefast.heads import ExitHead
from eefast.surgery.attachment import attach
from eefast.surgery.obstacles import check_backbone, check_names


def lazy(m: Custom) -> nn.Module:
    m.second = nn.LazyConv2d(8, 3)
    return m


def on_meta(m: Custom) -> nn.Module:
    m.second.to("meta")
    return m


def sparse(m: Custom) -> nn.Module:
    m.fc.weight = nn.Parameter(m.fc.weight.detach().to_sparse())
    return m


def complex_weights(m: Custom) -> nn.Module:
    m.first = nn.Conv2d(3, 8, 3, dtype=torch.complex64)
    return m


def fake(m: Custom) -> nn.Module:
    with FakeTensorMode():
        m.second = nn.Conv2d(8, 8, 3)
    return m


def subclassed(m: Custom) -> nn.Module:
    m.second.weight = nn.Parameter(TwoTensor(m.second.weight.detach(), m.second.weight.detach()))
    return m


def quantized_buffer(m: Custom) -> nn.Module:
    m.register_buffer("table", torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    return m


def scripted_inside(m: Custom) -> nn.Module:
    m.second = torch.jit.script(m.second)
    return m


def accelerated(m: Custom) -> nn.Module:
    return eefast.accelerate(attach(m, ["first"], input_shape=SMALL))


def dynamically_quantized(m: Custom) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(m, {nn.Linear})


class DistributedDataParallel(nn.Module):
    """In place of PyTorch's, which needs other processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lazy, "backbone.second.weight has no shape yet; run the backbone on one image first"),
        (on_meta, r"backbone.second.weight is on the meta device, without values; give it some, by .to_empty"),
        (sparse, r"backbone.fc.weight has layout torch.sparse_coo; make it dense by .to_dense\(\)"),
        (complex_weights, "the backbone cannot take such images"),
        (fake, "backbone.second.weight is a FakeTensor; attach exits to the backbone with plain tensors first"),
        (subclassed, "backbone.second.weight is a TwoTensor; attach exits to the backbone with plain tensors first"),
        (quantized_buffer, "backbone.table is quantized; attach exits first, then quantize the result"),
        (dynamically_quantized, "backbone.fc is a quantized Linear; attach exits first"),
        (scripted_inside, "backbone.second is a ScriptModule, which cannot be cut; give the module that it was made"),
        (lambda m: torch.jit.trace(m, images(2, SMALL)), "the backbone is a ScriptModule, which cannot be cut"),
        (lambda m: attach(m, ["first"], input_shape=SMALL), r"has exits already \(EarlyExitNet\); give one without"),
        (accelerated, r"the backbone has exits already \(Accelerated\); give one without, such as net.plain\(\)"),
        (lambda m: nn.Sequential(attach(m, [], input_shape=SMALL)), "backbone.0 has exits already"),
        (DistributedDataParallel, "the backbone is a DistributedDataParallel; attach exits to its module first"),
        (lambda m: m.forward, "backbone is a method; give an nn.Module that maps images to logits"),
    ],
)
def test_what_is_no_plain_module_of_plain_tensors_is_refused_before_any_work(change, message):
    backbone = change(make())
    if isinstance(backbone, nn.Module):
        backbone.register_forward_pre_hook(lambda *_: pytest.fail("it ran")) if change is lazy else None
    with pytest.raises(ValueError, match=message):
        attach(backbone, ["first"], input_shape=SMALL)


@pytest.mark.parametrize("change", [fake, lazy])
def test_a_network_of_odd_tensors_is_refused_as_well(change):
    stage = change(make()).second
    with pytest.raises(ValueError, match=r"a parameter is a FakeTensor; build the|has no shape yet"):
        eefast.EarlyExitNet([stage], [ExitHead("pool", (8, 6, 6), 5, SMALL)], input_shape=(8, 9, 9))


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ("layer1", r"exits='layer1' must be a list of names: exits=\['layer1'\]"),
        (["layer1", "layer2.3"], r"no module 'layer2.3'; take 'layer2.\d' or 'layer"),
        (["stem"], "no module 'stem'; take one of backbone.named_modules"),
        (["conv1", "bn2.weight"], "no module 'bn2.weight'"),
        (["downsample"], r"no module 'downsample'; take 'layer2\.0\.downsample' or 'layer3\.0\.downsample' or "),
        ([""], "no module ''"),
    ],
)
def test_names_that_no_module_has_are_refused(exits, message):
    with pytest.raises(ValueError, match=message):
        check_names(ResNet(BasicBlock, [1, 2, 1, 1], num_classes=7), exits)


def test_a_second_name_is_replaced_by_the_first():
    backbone = make()
    backbone.layers = nn.ModuleList([backbone.first, backbone.second])
    assert check_names(backbone, ["layers.1", "first"]) == ["second", "first"]
    assert check_names(backbone, []) == []


def test_a_plain_backbone_has_no_obstacle():
    check_backbone(make())
    check_backbone(nn.DataParallel(make().bfloat16().train()))
