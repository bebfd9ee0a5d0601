"""One-dimensional layers as two-dimensional ones of one row: the same numbers from the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from eefast.modules.one_row import on_maps

LAYERS: dict[str, nn.Module] = {
    "convolution": nn.Conv1d(4, 6, 3, padding=1),
    "strided": nn.Conv1d(4, 6, 5, 2, 2, bias=False),
    "dilated, in groups": nn.Conv1d(4, 8, 3, padding=2, dilation=2, groups=2),
    "same": nn.Conv1d(4, 4, 4, padding="same"),
    "circular": nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
    "norm": nn.BatchNorm1d(4),
    "norm without weights": nn.BatchNorm1d(4, affine=False),
    "max pool": nn.MaxPool1d(3, 2, 1),
    "max pool of tuples": nn.MaxPool1d((2,), (3,), dilation=(2,)),
    "max pool, ceil": nn.MaxPool1d(4, ceil_mode=True),
    "average pool": nn.AvgPool1d(3, 2, 1, count_include_pad=False),
    "adaptive average": nn.AdaptiveAvgPool1d(5),
    "adaptive maximum": nn.AdaptiveMaxPool1d((3,)),
    "dropout": nn.Dropout1d(0.5),
    "relu": nn.ReLU(),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("length", [9, 17, 128])
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # it is meant
def test_a_layer_computes_the_same(name: str, length: int) -> None:
    layer = LAYERS[name].eval()
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4, length)
    torch.testing.assert_close(on_maps(layer)(x.unsqueeze(2)), layer(x).unsqueeze(2))
    assert not on_maps(layer).training


def test_a_tree_keeps_its_names_and_shares_its_tensors() -> None:
    shared = nn.Conv1d(4, 4, 3, padding=1)
    net = nn.Sequential(shared, nn.Sequential(nn.BatchNorm1d(4), shared), nn.Flatten())
    made = on_maps(net)
    assert made[0] is made[1][1]
    assert type(net[0]) is nn.Conv1d
    assert [name for name, _ in made.named_modules()] == [name for name, _ in net.named_modules()]
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        shared.weight.mul_(3)
        net[1][0].weight.add_(1)
        net.eval(), made.eval()
        torch.testing.assert_close(made(x.unsqueeze(2)), net(x))
    assert made[0].weight.data_ptr() == shared.weight.data_ptr()


class Mine(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_other_classes_stay_as_they_are() -> None:
    made = on_maps(nn.Sequential(Mine(4, 4, 1)))
    assert type(made[0]) is Mine
    with pytest.raises(RuntimeError):
        made(torch.randn(2, 4, 1, 9))
