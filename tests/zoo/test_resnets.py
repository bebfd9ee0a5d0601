"""Plain ResNets: their multiply-accumulates as published."""

import pytest
import torch

from eefast import zoo
from eefast.cost import macs


@pytest.mark.parametrize(
    ("name", "shape", "classes", "mmacs"),
    [
        ("resnet20", (3, 32, 32), 10, 41.41), ("resnet32", (3, 32, 32), 10, 70.06),
        ("resnet44", (3, 32, 32), 10, 98.72), ("resnet56", (3, 32, 32), 10, 127.37),
        ("resnet110", (3, 32, 32), 10, 256.32), ("resnet18", (3, 32, 32), 10, 37.18),
        ("resnet34", (3, 32, 32), 10, 75.01), ("resnet50", (3, 32, 32), 10, 84.10),
        ("resnet101", (3, 64, 64), 200, 641.02), ("resnet152", (3, 64, 64), 200, 945.60),
        ("resnet20", (1, 28, 28), 10, 31.48), ("resnet50", (3, 224, 224), 1000, 4121.92),
    ],
)  # fmt: skip
def test_macs_of_the_plain_networks(name, shape, classes, mmacs):
    with torch.device("meta"):
        net = zoo.resnet(name, classes, shape)
    counted, out = macs(net, shape)
    assert round(counted / 1e6, 2) == mmacs
    assert out == (classes,)


@pytest.mark.parametrize("name", ["resnet21", "resnet²", "resnet" + "9" * 5000, "eenet20", ""])
def test_unknown_plain_networks(name):
    with pytest.raises(ValueError, match="is unknown; choose one of resnet18, resnet20"):
        zoo.resnet(name)
