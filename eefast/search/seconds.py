"""A network → the time of every stage and head for one image on this machine, as costs in nanoseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cost import StageCost
from ..model import EarlyExitNet
from ..planning.folding import fold_stage
from ..system.progress import Progress

# Images per call, and rounds over the whole network, of which the fastest call of each part counts.
BATCH_SIZE, ROUNDS = 64, 7


@torch.inference_mode()
def time_costs(net: EarlyExitNet, images: Tensor, progress: Progress) -> list[StageCost]:
    """Per exit the nanoseconds of its stage and its head for an image, in the place of MACs.

    images: prepared, [N, C, H, W] on the network's device. Parts run in PyTorch, channels-last, BatchNorms folded, one
    after the other; a head is its convolutions, since all else of it is part of one kernel in the compact engine.
    """
    x = images[:BATCH_SIZE].contiguous(memory_format=torch.channels_last)
    stages = [None if isinstance(stage, nn.Identity) else fold_stage(stage, x.dtype)[0] for stage in net.stages]
    heads = [_folded_head(head, x.dtype) for head in net.heads]
    best = [[float("inf")] * 2 for _ in stages]
    for number in range(ROUNDS):
        progress("timing stages and heads", number, ROUNDS)
        features = x
        for row, stage, head in zip(best, stages, heads, strict=True):
            if stage is None:
                row[0] = 0.0
            else:
                row[0], features = min(row[0], _seconds(stage, features)), stage(features)
            row[1] = min(row[1], _seconds(head, features))
    progress("timing stages and heads", ROUNDS, ROUNDS)
    return [
        # No channels: unlike MACs, the time of the confidence row is none of its own.
        StageCost(*_nanoseconds(row, len(x)), (0, *cost.feature_shape[1:]), cost.num_classes)
        for row, cost in zip(best, net.stage_costs, strict=True)
    ]


def _folded_head(head: Any, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    convs, *rest = fold_stage(head.convs, dtype)[0], head.norm, head.pool
    linear = torch.cat([head.classifier.weight, head.confidence.weight]).to(dtype)
    after = nn.Sequential(*rest)
    return lambda features: nn.functional.linear(after(convs(features)), linear)


def _nanoseconds(seconds: Sequence[float], images: int) -> tuple[int, int]:
    stage, head = (round(1e9 * part / images) for part in seconds)
    return stage, head


def _seconds(run: Callable[[Tensor], Any], x: Tensor) -> float:
    def wait() -> None:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)

    wait()
    begin = time.perf_counter()
    run(x)
    wait()
    return time.perf_counter() - begin
