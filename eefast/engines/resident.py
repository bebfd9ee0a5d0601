"""The resident engine: one op carries every sample to its own exit; there is no batch to compact."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..planning.planner import Plan
from ..result import ExitResult


def run(plan: Plan, net: EarlyExitNet, x: Tensor, limits: Tensor | None = None, threads: int = 0) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`; on CUDA also uint8 images.

    limits: thresholds, by default those of this moment. threads: as in `ops.resident_forward`.
    """
    p = plan.program
    assert p is not None
    x = x if plan.device.type == "cuda" else x.float()
    normalization = p.normalization if x.dtype == torch.uint8 else None
    limits = net.limits()[0] if limits is None else limits
    tables = p.steps, p.maps, p.groups, p.weights, p.packed, limits
    logits, confidence, exits = ops.resident_forward.run(
        x, *tables, plan.criterion, net.num_classes, p.bfloat16, threads, None, normalization
    )
    return ExitResult(logits, exits, confidence, net.cost.index_select(0, exits))
