"""The compact engine: a batch per stage, one fused op per exit, the survivors are the batch of the next stage."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..plan import Plan
from ..result import ExitResult


def run(plan: Plan, net: EarlyExitNet, x: Tensor) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`."""
    n, last = len(x), net.num_exits
    logits = torch.zeros(n, net.num_classes, dtype=torch.float32)
    confidence, exits = torch.zeros(n), torch.zeros(n, dtype=torch.int64)
    order = torch.arange(n, dtype=torch.int32)
    positions, survivors = order, n
    features = x.to(plan.dtype, memory_format=torch.channels_last)
    for i, step in enumerate(plan.steps):
        if survivors == 0:
            break
        features = step.stage(features)
        seen = step.head_convs(features)
        if step.flatten:
            seen = seen.permute(0, 2, 3, 1).reshape(survivors, -1, 1, 1)
        rows, positions, live = ops.exit_head(
            seen, step.weight, step.bias, net.thresholds[i] if i < last else None, order[:survivors], positions,
            order.new_tensor([survivors]), plan.criterion, i, logits, confidence, exits,
        )  # fmt: skip
        remaining = int(live)  # the one place where the host reads a count
        if 0 < remaining < survivors:
            features = _gather(features, rows[:remaining])
            positions = positions[:remaining]
        survivors = remaining
    return ExitResult(logits, exits, confidence, net.cost[exits])


def _gather(features: Tensor, rows: Tensor) -> Tensor:
    """The named rows of [N, C, H, W], channels-last."""
    return features.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
