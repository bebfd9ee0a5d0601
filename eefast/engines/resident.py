"""The resident engine: one op carries every sample to its own exit; there is no batch to compact."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..plan import Plan
from ..result import ExitResult


def run(plan: Plan, net: EarlyExitNet, x: Tensor, threads: int = 0) -> ExitResult:
    """Prepared images [N, C, H, W] → `ExitResult`; threads as in `ops.resident_forward`."""
    p = plan.program
    assert p is not None
    tables = p.steps, p.maps, p.groups, p.weights, p.packed, net.thresholds
    found = ops.resident_forward(x.float(), *tables, plan.criterion, net.num_classes, p.bfloat16, threads)
    logits, confidence, exits = found
    return ExitResult(logits, exits, confidence, net.cost.index_select(0, exits))
