"""Networks around odd stages and heads, and the claim that every engine gives their answers or says why it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import eefast
from eefast.heads import ExitHead

SHAPE = (3, 9, 7)
ENGINES = ("compact", "resident", "auto")


def conv(inputs: int = 8, outputs: int = 8, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **more)


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    """A convolution and a BatchNorm for a `Stage`."""
    return {"conv": conv(), "norm": nn.BatchNorm2d(8), **more}


COMPUTED_WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.Sequential(weight_norm(conv()), nn.BatchNorm2d(8)),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(conv()), nn.BatchNorm2d(8)),
    "pruned": lambda: nn.Sequential(prune.l1_unstructured(conv(), "weight", 0.5), nn.BatchNorm2d(8)),
    "parametrised": lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(8)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(conv()), nn.BatchNorm2d(8)),
}
"""Stages with weights that PyTorch computes at every call."""


def randomised(net: nn.Module) -> nn.Module:
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.running_mean, m.weight, m.bias):
                if t is not None:
                    nn.init.normal_(t, 0.4)
            if m.running_var is not None:
                m.running_var.uniform_(0.3, 2)
    return net.eval()


def network(*stages: nn.Module, channels: int = 8, head: str = "pool") -> eefast.EarlyExitNet:
    """A stem, the stages, and after each an exit at which no sample exits."""
    stages = (nn.Sequential(conv(3, 8), nn.ReLU()), *stages)
    heads = [ExitHead(head, (8, *SHAPE[1:]), 5, SHAPE) for _ in stages[1:]]
    heads.append(ExitHead(head, (channels, *SHAPE[1:]), 5, SHAPE))
    made = eefast.EarlyExitNet(stages, heads, input_shape=SHAPE, criterion="max_probability")
    made.thresholds.fill_(1.0)
    return randomised(made)


class ActivatedNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


def assert_answers_or_refusal(net: Any, x: Tensor, engine: str, tolerance: float = 1e-4) -> str:
    """The reason of a refusal, or nothing."""
    try:
        fast = eefast.accelerate(net, engine=engine)
    except ValueError as error:
        return str(error)
    with torch.no_grad():
        wanted = net(x)
    got = fast(x)
    assert torch.equal(got.exit_index, wanted.exit_index)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=tolerance * float(wanted.logits.abs().max()))
    return ""
