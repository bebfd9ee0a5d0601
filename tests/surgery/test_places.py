"""Places for exits: found in backbones of several kinds, and taken by `attach`."""

import pytest
from networks import lived_in
from torch import nn

import eefast
from eefast.surgery import backbone
from eefast.surgery.places import find_places

CHAIN = nn.Sequential(
    nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.MaxPool2d(2),
    nn.Sequential(nn.Conv2d(5, 6, 1), nn.ReLU()), nn.Conv2d(6, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(7, 5),
)  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (CHAIN, ["2", "4", "5"]),
        (
            "torchvision:resnet18",
            ["maxpool", "layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0"],
        ),
        ("timm:resnet10t", ["conv1.2", "conv1.5", "maxpool", "layer1", "layer2", "layer3"]),
    ],
    ids=str,
)
def test_places_are_before_the_next_convolutions(body, expected):
    made = lived_in(body if isinstance(body, nn.Module) else backbone(body, 5), 1)
    places = find_places(made, (3, 33, 32))
    assert places == expected
    net = eefast.attach(made, places, input_shape=(3, 33, 32))
    assert min(cost.stage_macs for cost in net.stage_costs) > 0


def test_a_backbone_without_a_place_is_refused():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    with pytest.raises(ValueError, match=r"no module that returns one map .* exits cannot be attached to it"):
        find_places(body, (3, 9, 9))
