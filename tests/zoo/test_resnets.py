"""Plain ResNets: blocks, maps, and their multiply-accumulates as published."""

import pytest
import torch

from eefast import zoo
from eefast.cost import macs
from eefast.zoo.resnets import BasicBlock, Bottleneck, trunk


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


@pytest.mark.parametrize(("name", "fewer"), [("resnet14", 1), ("resnet8", 2)])
def test_smaller_networks_lack_as_many_blocks_in_every_group(name, fewer):
    with torch.device("meta"):
        counts = [macs(zoo.resnet(each), (3, 32, 32))[0] for each in (name, "resnet20", "resnet32")]
        cut = zoo.eenet(name.replace("resnet14", "eenet14"), 1, [1])
    # ResNet-32 has two blocks more in each group than ResNet-20.
    assert counts[1] - counts[0] == fewer * (counts[2] - counts[1]) / 2
    assert macs(cut.plain(), (3, 32, 32))[0] == counts[0]


@pytest.mark.parametrize("name", ["resnet21", "resnet²", "resnet" + "9" * 5000, "eenet20", ""])
def test_unknown_plain_networks(name):
    with pytest.raises(ValueError, match="is unknown; choose one of resnet8, resnet14, resnet18, resnet20"):
        zoo.resnet(name)


@pytest.mark.parametrize(
    ("depth", "blocks", "kind", "width", "maps"),
    [
        (20, 9, BasicBlock, 64, [(16, 32)] * 3 + [(32, 16)] * 3 + [(64, 8)] * 3),
        (18, 8, BasicBlock, 512, [(64, 8)] * 2 + [(128, 4)] * 2 + [(256, 2)] * 2 + [(512, 1)] * 2),
        (50, 16, Bottleneck, 2048, [(256, 8)] * 3 + [(512, 4)] * 4 + [(1024, 2)] * 6 + [(2048, 1)] * 3),
    ],
)
def test_blocks_and_maps_of_every_family(depth, blocks, kind, width, maps):
    with torch.device("meta"):
        stem, found, channels = trunk(depth, 3)
        x = stem(torch.empty(2, 3, 32, 32))
        shapes = [tuple((x := block(x)).shape[1:3]) for block in found]
    assert (len(found), channels) == (blocks, width)
    assert {type(block) for block in found} == {kind}
    assert shapes == maps


@pytest.mark.parametrize("depth", [0, 19, 21])
def test_unknown_depths(depth):
    with pytest.raises(ValueError, match=f"there is no ResNet-{depth}; choose one of 8, 14, 18, 20, 32"):
        trunk(depth, 3)
