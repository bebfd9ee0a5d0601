"""A stage and the head after it → one module: features → the stage's features, and what the head's linear reads."""

from __future__ import annotations

from torch import Tensor, nn


class StageAndHead(nn.Module):
    """stage, convs: features → features. flatten: the head reads the whole map instead of its mean."""

    def __init__(self, stage: nn.Module, convs: nn.Module, flatten: bool) -> None:
        super().__init__()
        self.stage, self.convs, self.flatten = stage, convs, flatten

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, C, H, W] and, of the head, [N, C', 1, 1]."""
        features = self.stage(x)
        return features, head_input(self.convs(features), self.flatten)


def head_input(seen: Tensor, flatten: bool) -> Tensor:
    """[N, C', H, W] → [N, C' or H·W·C', 1, 1]."""
    if flatten:
        return seen.permute(0, 2, 3, 1).flatten(1)[:, :, None, None]
    return seen.mean((2, 3), keepdim=True)
