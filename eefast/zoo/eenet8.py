"""EENet-8: the hand-written three-block network of 2 … 16 filters with an exit after each of its first two blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """[BatchNorm, ReLU,] conv3x3, BatchNorm, ReLU, conv3x3 and a shortcut: C_in → C channels, maps ÷ stride."""

    def __init__(self, in_channels: int, channels: int, stride: int, first: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = [] if first else [nn.BatchNorm2d(in_channels), nn.ReLU(inplace=False)]
        layers += [
            nn.Conv2d(in_channels, channels, 3, stride, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
        ]
        self.residual = nn.Sequential(*layers)
        self.shortcut = nn.Identity() if first else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


def stages(filters: int, input_shape: Sequence[int]) -> list[nn.Module]:
    """The three stages of EENet-8 with `filters` channels at first, then 2 and 4 times as many."""
    stem = nn.Sequential(
        nn.Conv2d(input_shape[0], filters, 3, padding=1), nn.BatchNorm2d(filters), nn.ReLU(inplace=True)
    )
    final = nn.Sequential(nn.BatchNorm2d(filters * 4), nn.ReLU(inplace=True))
    return [
        nn.Sequential(stem, PreActivationBlock(filters, filters, 1, first=True)),
        nn.Sequential(PreActivationBlock(filters, filters * 2, 2, first=False)),
        nn.Sequential(PreActivationBlock(filters * 2, filters * 4, 2, first=False), final),
    ]
