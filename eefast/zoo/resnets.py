"""Plain residual networks: the trunks that exits are put into, and the same networks without exits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

# He et al. 2016: the ImageNet family by blocks per group, the CIFAR family (6n+2 layers) by layers.
_IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_CIFAR = (20, 32, 44, 56, 110)
DEPTHS = tuple(sorted((*_IMAGENET, *_CIFAR)))
# Of the CIFAR family too, smaller than the papers', to be compared with them.
SMALLER = (8, 14)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: [N, C_in, H, W] → [N, C, H/stride, W/stride]."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1, rows: bool = False) -> None:
        super().__init__()
        conv, norm = layers_of(rows)
        self.conv1 = conv(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = _projection(in_channels, channels, stride, rows)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut: [N, C_in, H, W] → [N, 4·C, H/stride, W/stride]."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1, rows: bool = False) -> None:
        super().__init__()
        conv, norm = layers_of(rows)
        self.conv1 = conv(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = conv(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = conv(channels, channels * self.expansion, 1, bias=False)
        self.bn3 = norm(channels * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, channels * self.expansion, stride, rows)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


def layers_of(rows: bool) -> tuple[Any, Any]:
    """The classes of convolution and BatchNorm; rows: on rows [N, C, L] instead of maps [N, C, H, W]."""
    return (nn.Conv1d, nn.BatchNorm1d) if rows else (nn.Conv2d, nn.BatchNorm2d)


def _projection(in_channels: int, out_channels: int, stride: int, rows: bool) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    conv, norm = layers_of(rows)
    return nn.Sequential(conv(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def trunk(depth: int, in_channels: int, rows: bool = False) -> tuple[nn.Module, list[nn.Module], int]:
    """Stem, residual blocks and number of output channels of the ResNet with `depth` layers; rows: see `layers_of`."""
    if depth not in (*SMALLER, *DEPTHS):
        raise ValueError(f"there is no ResNet-{depth}; choose one of {', '.join(map(str, (*SMALLER, *DEPTHS)))}")
    conv_class, norm_class = layers_of(rows)
    block: type[BasicBlock] | type[Bottleneck] = Bottleneck if depth in (50, 101, 152) else BasicBlock
    if depth in (*SMALLER, *_CIFAR):
        channels, repetitions = 16, [(depth - 2) // 6] * 3
        conv = conv_class(in_channels, channels, 3, padding=1, bias=False)
        stem = nn.Sequential(conv, norm_class(channels), nn.ReLU(inplace=True))
    else:
        channels, repetitions = 64, list(_IMAGENET[depth])
        conv, pool = (
            conv_class(in_channels, channels, 7, 2, padding=3, bias=False),
            nn.MaxPool1d if rows else nn.MaxPool2d,
        )
        stem = nn.Sequential(conv, norm_class(channels), nn.ReLU(inplace=True), pool(3, 2, padding=1))
    blocks: list[nn.Module] = []
    width = channels
    for group, repetition in enumerate(repetitions):
        for i in range(repetition):
            blocks.append(block(width, channels << group, 2 if group and i == 0 else 1, rows))
            width = (channels << group) * block.expansion
    return stem, blocks, width


def resnet(name: str, num_classes: int = 10, input_shape: Sequence[int] = (3, 32, 32)) -> nn.Sequential:
    """The plain network "resnet8" … "resnet152" of an EENet, without exits: images [N, C, H, W] → logits [N, K]."""
    depths = {f"resnet{depth}": depth for depth in (*SMALLER, *DEPTHS)}
    if (depth := depths.get(name)) is None:
        raise ValueError(f"name={name!r} is unknown; choose one of {', '.join(depths)}")
    stem, blocks, width = trunk(depth, input_shape[0])
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
    net = nn.Sequential(stem, *blocks, *head)
    initialise(net)
    return net


def initialise(module: nn.Module) -> None:
    """Kaiming-normal (fan out) convolutions, unit BatchNorms, as the reference has them; in place."""
    for m in module.modules():
        if isinstance(m, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.ones_(m.weight)
            nn.init.zeros_(m.bias)
