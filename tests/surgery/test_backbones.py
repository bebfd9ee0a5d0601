"""Backbones by name: those of torchvision and timm that classify, near names for wrong ones."""

import copy
import pickle
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from eefast.surgery import backbone
from eefast.surgery.backbones import origin


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:resnet81", "'torchvision:resnet81' is unknown to torchvision; similar names: resnet18"),
        ("timm:resnet10tt", "'timm:resnet10tt' is unknown to timm; similar names: resnet10t"),
        ("resnet18", "must be torchvision:NAME or timm:NAME"),
        # It would download the weights of its backbone.
        ("torchvision:fasterrcnn_resnet50_fpn", "'torchvision:fasterrcnn_resnet50_fpn' is unknown to torchvision"),
    ],
)
def test_names_that_no_backbone_has(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(name, 10)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return backbone("timm:resnet10t", 5, 1)


@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, prune.identity])
def test_a_backbone_with_other_weights_is_no_longer_the_librarys(small: nn.Module, change: Any) -> None:
    changed = copy.deepcopy(small)
    assert origin(changed) == "timm:resnet10t"
    change(changed.layer1[0].conv1, *(["weight"] if change is prune.identity else []))
    assert origin(changed) is None


def test_a_backbone_has_the_classes_and_channels_asked_for(small: nn.Module) -> None:
    with torch.no_grad():
        assert small.eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_a_copy_keeps_the_name(small: nn.Module, copied) -> None:
    other = copied(small)
    assert origin(small) == origin(other) == "timm:resnet10t"
    other.fc = nn.Linear(512, 7)
    assert origin(other) is None
    assert origin(small) == "timm:resnet10t"


def test_other_networks_have_no_name() -> None:
    assert origin(nn.Linear(3, 5)) is None


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="backbone='timm:resnet10t' needs timm: pip install timm"):
        backbone("timm:resnet10t", 5)
