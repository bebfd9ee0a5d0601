"""A network and prepared images → outputs of all exits whose gradients are averaged in the trunk, not summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitOutput


def compute_exits(net: EarlyExitNet, x: Tensor) -> list[ExitOutput]:
    """As `net.all_exits(x)`; backwards, a stage gets the mean of the gradients of the exits after it, a head its whole.

    "Gradient equilibrium" (Li et al. 2019): the gradient that reaches the trunk does not grow with the number of exits.
    x: prepared images [N, C, H, W].
    """
    outputs, later = [], len(net.heads)
    for stage, head in zip(net.stages, net.heads, strict=True):
        x = _scale_gradient(stage(x), 1 / later)
        outputs.append(head(x))
        later -= 1
        x = _scale_gradient(x, later)
    return outputs


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * context.factor, None


def _scale_gradient(x: Tensor, factor: float) -> Tensor:
    scaled: Tensor = _ScaledGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return scaled
