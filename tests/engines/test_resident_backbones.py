"""Backbones of torchvision and timm as steps of the resident engine, against the uncut backbones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from networks import images, lived_in, one_by_one
from resident_calls import tables
from torch import nn

import eefast
from eefast import ops
from eefast.engines.resident import ResidentEngine

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
models = torchvision.models


def timm(name: str) -> nn.Module:
    found: nn.Module = pytest.importorskip("timm", reason="timm is not installed").create_model(name, num_classes=7)
    return found


def resnext() -> nn.Module:
    block = models.resnet.Bottleneck
    return models.ResNet(block, [1, 1, 1, 1], num_classes=7, groups=32, width_per_group=4)


CASES: dict[str, tuple[Callable[[], nn.Module], list[str], tuple[int, int]]] = {
    "MobileNetV2": (
        partial(models.mobilenet_v2, num_classes=7, width_mult=0.35),
        ["features.4", "features.11"],
        (40, 33),
    ),
    "MobileNetV3": (partial(models.mobilenet_v3_small, num_classes=7), ["features.3", "features.8"], (64, 64)),
    "EfficientNet-B0": (partial(models.efficientnet_b0, num_classes=7), ["features.2", "features.4"], (32, 47)),
    "RegNetY": (partial(models.regnet_y_400mf, num_classes=7), ["trunk_output.block1"], (35, 32)),
    "RegNetX": (partial(models.regnet_x_400mf, num_classes=7), ["trunk_output.block2"], (32, 32)),
    "DenseNet": (
        partial(models.DenseNet, 16, (3, 4, 2), 32, num_classes=7),
        ["features.denseblock1", "features.transition2"],
        (33, 40),
    ),
    "ResNeXt": (resnext, ["layer1", "layer3"], (32, 32)),
    "timm MobileNetV3": (partial(timm, "mobilenetv3_small_050"), ["blocks.1", "blocks.3"], (48, 33)),
    "timm RegNetY": (partial(timm, "regnety_002"), ["s1", "s3"], (32, 40)),
    "timm EfficientNet-Lite": (partial(timm, "efficientnet_lite0"), ["blocks.1"], (32, 32)),
}

ALIKE = ("RegNetX", "timm RegNetY", "timm EfficientNet-Lite")
"""Backbones of the same layers as others here."""


@pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")
@pytest.mark.parametrize("name", [pytest.param(c, marks=[pytest.mark.slow] if c in ALIKE else []) for c in CASES])
@torch.no_grad()
@pytest.mark.sampled(4)
def test_backbones_as_steps_say_what_they_say_uncut(name: str) -> None:
    make, exits, size = CASES[name]
    torch.manual_seed(0)
    backbone = lived_in(make().eval(), 1)
    net = lived_in(eefast.attach(backbone, exits, input_shape=(3, *size)), 1).eval()
    x = images(5, (3, *size))
    uncut = copy.deepcopy(backbone).double()(x.double()).float()
    outputs = copy.deepcopy(net).double().all_exits(x.double())
    torch.testing.assert_close(outputs[-1].logits.float(), uncut)
    program, n = tables(net, 4, 3), net.num_exits
    for i, wanted in enumerate(outputs):
        limits = torch.tensor([-1.0 if i == j else 2.0 for j in range(n)])
        for threads, part in ((1, slice(None)), (2, slice(1, 2))):
            logits, _, chosen = ops.resident_forward.run(x[part], *program, limits, "learned", 7, False, threads)
            assert (chosen == i).all()
            scale = float(wanted.logits.abs().max())
            torch.testing.assert_close(logits, wanted.logits[part].float(), rtol=0, atol=3e-5 * scale)


@pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")
def test_attached_networks_run_in_the_resident_engine() -> None:
    torch.manual_seed(0)
    backbone = models.mobilenet_v3_small(num_classes=7).eval()
    net = lived_in(eefast.attach(backbone, ["features.3"], input_shape=(3, 32, 32)), 1).eval()
    fast, x = eefast.accelerate(net, engine="resident"), images(5, (3, 32, 32))
    assert isinstance(fast.engine, ResidentEngine)
    expected, found = one_by_one(net, x), fast(x)
    assert torch.equal(found.exit_index, expected.exit_index)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=3e-5 * float(expected.logits.abs().max()))
