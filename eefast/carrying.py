"""Features of the last early exit → the final exit's pooled features, joined with those that the early exit reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .heads import ExitHead

CARRIES = ("features",)


class JoinedStage(nn.Module):
    """The last stage of a network that carries features, as T-RecX (Ghanathe & Wilton 2023).

    stage: the layers from the last early exit to the final one.
    early: the head of that exit; its convolutions and its BatchNorm are shared, and run again for the samples that
        reach the final exit, so that nothing has to be kept of the others.

    forward: features [N, C, H, W] or [N, C, L] → [N, C' + E, 1, 1] or [N, C' + E, 1]: the mean of the map of `stage`,
    then the E pooled features that the linear of `early` reads.
    """

    def __init__(self, stage: nn.Module, early: ExitHead) -> None:
        super().__init__()
        self.stage, self.early_convs, self.early_norm = stage, early.convs, early.norm
        self.pool = (nn.AdaptiveAvgPool1d if len(early.feature_shape) == 2 else nn.AdaptiveAvgPool2d)(1)

    def forward(self, features: Tensor) -> Tensor:
        # First, since the first layer of the stage may write over its input.
        early = self.pool(self.early_norm(self.early_convs(features)))
        return torch.cat([self.pool(self.stage(features)), early], 1)


def carry_on(
    carry: str | None, stages: list[nn.Module], heads: list[ExitHead], input_shape: Sequence[int]
) -> str | None:
    """Let the final exit read the pooled features of the last early one, too; changes the last of `stages` and `heads`.

    carry: "features", or None for a network whose exits read their own features only. Returns it.
    Raises `ValueError` for another name, and for heads that pool nothing.
    """
    if carry is None:
        return None
    if carry not in CARRIES:
        raise ValueError(f"carry={carry!r} is unknown; choose {', '.join(map(repr, CARRIES))} or None")
    if len(heads) < 2:
        raise ValueError(f"carry={carry!r} needs an early exit, whose features the final one reads; give at least one")
    early, final = heads[-2:]
    if early.kind == "plain":
        raise ValueError(
            f"carry={carry!r} joins pooled features, but the head of exit {len(heads) - 2} is 'plain' and flattens its "
            "map; choose another kind of head there"
        )
    classifier, channels = final.classifier, final.feature_shape[0]
    shape = channels + early.num_features, *[1] * (len(input_shape) - 1)
    stages[-1] = JoinedStage(stages[-1], early)
    with classifier.weight.device:
        heads[-1] = made = ExitHead("pool", shape, classifier.out_features, input_shape).to(classifier.weight.dtype)
        with torch.no_grad():
            made.classifier.weight.zero_()[:, :channels] = classifier.weight
            made.classifier.bias.copy_(classifier.bias if classifier.bias is not None else torch.zeros(()))
    return carry
