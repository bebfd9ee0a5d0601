"""Early exit by PyPI's earlyon: the batch exits as a whole, at the first exit at which all of its images are sure.

Its hooks and its decision by the largest softmax probability; our trunk, heads and weights, BatchNorm folded. earlyon
knows no confidence row, so its heads leave that one out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage
from eefast.result import ExitResult

from .peer import Peer, torch_version

RULE = "max_probability"


def prepare(net: EarlyExitNet) -> Run:
    """The network's thresholds are taken as those of the largest probability, whatever its criterion."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint

    stages = [fold_stage(stage, torch.float32)[0] for stage in net.stages]
    *early, final = (_logits(head) for head in net.heads)
    widths = [cost.num_features for cost in net.stage_costs]
    points = [ExitPoint(f"exit {i}", str(i), widths[i]) for i in range(net.num_exits)]
    config = EarlyExitConfig("eefast", net.num_classes, points)
    heads = {point.name: head for point, head in zip(points, early, strict=True)}
    wrapper = EarlyExitWrapper(nn.Sequential(*stages), heads, final, config, (1, *net.input_shape)).eval()

    def run(x: Tensor) -> ExitResult:
        limits = net.thresholds.tolist()
        # No image exits above 1; for that earlyon has a switch, which saves the head as well.
        config.enabled_exits = [limit <= 1 for limit in limits]
        config.confidence_thresholds = limits
        found = wrapper.forward_inference_batched(x)
        exits = torch.full((len(x),), found.exit_taken % (net.num_exits + 1))
        return ExitResult(found.predictions, exits, found.per_sample_confidence, net.cost[exits])

    return run


def _logits(head: Any) -> nn.Sequential:
    """Features → logits."""
    parts = copy.deepcopy((head.norm, head.pool, head.classifier))
    return nn.Sequential(fold_stage(head.convs, torch.float32)[0], *parts).requires_grad_(False)


def describe() -> str:
    import earlyon

    return f"earlyon {earlyon.__version__}, {torch_version()}"


PEER = Peer(
    "earlyon, batched",
    prepare,
    describe,
    False,
    "torch",
    memory_format=torch.channels_last,
    needs=("earlyon",),
    whole_batch=RULE,
)
