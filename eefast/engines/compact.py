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
    n, last, device = len(x), net.num_exits, x.device
    logits = torch.zeros(n, net.num_classes, dtype=torch.float32, device=device)
    confidence, exits = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    order = torch.arange(n, dtype=torch.int32, device=device)
    positions, live, survivors = order, torch.full((1,), n, dtype=torch.int32, device=device), n
    features = x.to(plan.dtype, memory_format=torch.channels_last)
    for i, step in enumerate(plan.steps):
        if survivors == 0:
            break
        features = step.stage(features)
        seen = step.head_convs(features)
        if step.flatten:
            seen = seen.permute(0, 2, 3, 1).reshape(survivors, -1, 1, 1)
        threshold = net.thresholds[i] if i < last else None
        entries = order[:survivors], positions[:survivors], live
        head = step.weight, step.bias, threshold, *entries, plan.criterion, i, logits, confidence, exits
        if step.conv is None:
            rows, positions, live = ops.exit_head(seen, *head)
        else:
            conv_weight, conv_bias = step.conv
            rows, positions, live = ops.exit_conv_head(seen, conv_weight, conv_bias, *head)
        remaining = int(live)  # the one place where the host reads a count
        if 0 < remaining < survivors:
            everyone, features = features, torch.empty_like(features[:remaining])
            ops.compact(everyone, rows[:remaining], live, features)
        survivors = remaining
    return ExitResult(logits, exits, confidence, net.cost[exits])
