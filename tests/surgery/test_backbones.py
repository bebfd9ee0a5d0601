"""Backbones by name: those of torchvision and timm that classify, near names for wrong ones."""

import pytest

from eefast.surgery import backbone


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
