"""The reference engine: the network's own plain forward pass, which defines the right answer."""

from __future__ import annotations

from torch import Tensor

from ..model import EarlyExitNet
from ..plan import Plan
from ..result import ExitResult


def run(plan: Plan, net: EarlyExitNet, x: Tensor) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`."""
    return net.first_exits(x)
