"""The reference engine: the network's own plain forward pass, which defines the right answer."""

from __future__ import annotations

from torch import Tensor

from .. import criteria
from ..model import EarlyExitNet
from ..planning.planner import Plan
from ..result import ExitResult


def run(plan: Plan, net: EarlyExitNet, x: Tensor, limits: Tensor | None = None) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`; limits: thresholds, by default those of this moment."""
    criterion = net.criterion
    # Another thread may have changed it since, with thresholds that belong to it.
    return net.first_exits(x, limits, criterion if criterion.name == plan.criterion else criteria.get(plan.criterion))
