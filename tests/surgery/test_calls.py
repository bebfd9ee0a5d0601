"""Calls of a backbone's modules: which is the classifier, and which of them return maps."""

from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from custom_backbones import SMALL, Custom, make, plain
from networks import images
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from eefast.surgery.attachment import attach
from eefast.surgery.calls import Call, find_classifier, layouts_of, noise_images, other_sizes, watch


def softmax(m: Custom, x: Tensor) -> Tensor:
    return m.last(plain(m, x))


def unused(m: Custom, x: Tensor) -> Tensor:
    return m.fc(m.pool(m.first(x)).flatten(1))


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        (
            make(softmax, last=nn.Softmax(1)),
            {},
            r"logits come from 'last', Softmax\(dim=1\); they must be the output of",
        ),
        (make(lambda m, x: [plain(m, x)]), {}, r"returns a list; wrap it in a module that returns logits \[N, K\]"),
        (make(lambda m, x: m.first(x)), {}, r"returns shape \(2, 8, 15, 13\); wrap it"),
        (Custom(fc=nn.Linear(8, 5, bias=False)), {}, r"'fc' has no bias; give it one: backbone.fc.bias = nn.Parameter"),
        (
            make(),
            {"num_classes": 9},
            r"num_classes=9, but .* 5; first replace its last layer 'fc' by nn.Linear\(8, 9\)",
        ),
        (
            make(),
            {"input_shape": (0, 17, 15)},
            r"input_shape=\(0, 17, 15\) must be \(C, H, W\) or, of rows, \(C, L\), each at least 1",
        ),
        (make(), {"input_shape": (17, 15)}, r"input_shape=\(17, 15\): the backbone cannot take such images \("),
        (make(), {"input_shape": (1, 17, 15)}, r"input_shape=\(1, 17, 15\): the backbone cannot take such images \("),
        (make(unused), {"exits": ["second"]}, "'second' is called 0 times"),
    ],
)
def test_backbones_without_images_or_a_classifier_are_refused(backbone, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(backbone, **{"exits": ["first"], "input_shape": SMALL, **arguments})


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["layer1.0.relu"], "'layer1.0.relu' is called 2 times; take a module that is called once"),
        (["fc"], r"'fc' returns shape \[N, 7\], but an exit needs maps"),
        (["layer1", "fc"], r"exits=\['layer1', 'fc'\]: 'fc' returns"),
    ],
)
def test_exits_need_one_map(exits, message):
    backbone = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)
    with pytest.raises(ValueError, match=message):
        attach(backbone, exits, input_shape=(3, 32, 32))


@pytest.mark.parametrize(
    ("shape", "wanted"), [((3, 8, 16, 12), "maps [N, C, H, W] or tokens [N, T, C]"), ((2, 8), "maps [N, C, H, W] or")]
)
def test_what_looks_like_no_map(shape, wanted):
    calls = [Call("a", nn.Identity(), (), torch.zeros(shape))]
    shown = ", ".join(map(str, shape[1:]))
    with pytest.raises(ValueError, match=re.escape(f"'a' returns shape [N, {shown}], but an exit needs {wanted}")):
        layouts_of(["a"], calls, torch.zeros(2, 3, 16, 12))


def test_each_exit_has_its_layout():
    values = torch.zeros(2, 8, 16, 12), torch.zeros(2, 16, 12, 40), torch.zeros(2, 49, 8)
    calls = [Call(name, nn.Identity(), (), value) for name, value in zip("abc", values, strict=True)]
    assert layouts_of("abc", calls, torch.zeros(2, 3, 16, 12)) == ["map", "channels-last", "tokens"]


def test_what_is_no_tensor_is_no_map():
    calls = [Call("a", nn.Identity(), (), (torch.zeros(2, 3, 4, 4),))]
    with pytest.raises(ValueError, match=r"'a' returns a tuple; take a module that returns one map \[N, C, H, W\]"):
        layouts_of(["a"], calls, torch.zeros(2, 3, 4, 4))


@torch.no_grad()
def test_calls_are_listed_in_the_order_in_which_they_end():
    backbone = make()
    x = images(2, SMALL)
    calls = watch(backbone, x)
    assert [call.name for call in calls] == ["first", "norm", "relu", "second", "third", "pool", "fc", ""]
    assert calls[0].module is backbone.first
    assert torch.equal(calls[0].received[0], x)
    assert torch.equal(calls[-1].returned, backbone(x))
    assert find_classifier(calls, None) == find_classifier(calls, 5) == ("fc", backbone.fc)


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays(fails):
    backbone = make(lambda m, x: 1 / 0) if fails else make()
    with pytest.raises(ValueError, match=r"cannot take such images \(division by zero\)") if fails else nullcontext():
        watch(backbone, images(2, SMALL), training=True)
    assert not any(module._forward_hooks for module in backbone.modules())
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize(("device", "dtype", "n"), [("cpu", torch.bfloat16, 2), ("meta", torch.float32, 17)])
def test_noise_has_the_device_and_dtype_of_the_weights(device, dtype, n):
    found = noise_images(make().to(device, dtype), SMALL)
    assert (found.device.type, found.dtype, found.shape) == (device, dtype, (n, *SMALL))
    if device == "cpu":
        assert torch.equal(found, noise_images(make().to(dtype), SMALL)), "the same every time"


def one_size(m: Custom, x: Tensor) -> Tensor:
    return plain(m, x.view(x.size(0), *SMALL))


@pytest.mark.parametrize(
    ("forward", "shapes"),
    [(plain, [(1, 3, 26, 20), (3, 3, 13, 8)]), (one_size, [(1, *SMALL), (3, *SMALL)])],
    ids=["any size", "one size"],
)
@torch.no_grad()
def test_backbones_are_tried_at_other_sizes_where_they_take_them(forward, shapes):
    backbone = make(forward)
    found = other_sizes(backbone, images(2, SMALL))
    assert [tuple(x.shape) for x, _ in found] == shapes
    assert all(torch.equal(logits, backbone(x)) for x, logits in found)
