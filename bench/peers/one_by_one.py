"""Early exit: the loop of the reference repository, one image at a time until the exit that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet
from eefast.result import ExitResult

from .peer import Peer, torch_version


def prepare(net: EarlyExitNet) -> Run:
    parts = list(zip(net.stages, net.heads, strict=True))

    def answer(image: Tensor, thresholds: Sequence[Tensor]) -> tuple[Tensor, int, float]:
        features = image
        for i, (stage, head) in enumerate(parts):
            features = stage(features)
            out = head(features)
            confidence: Any = net.criterion.confidence(out.logits, out.confidence_logit)
            if i == net.num_exits or bool(net.criterion.leaves(confidence, thresholds[i])):
                break
        return out.logits, i, float(confidence)

    @torch.inference_mode()
    def run(x: Tensor) -> ExitResult:
        thresholds = net.thresholds.unbind()
        logits, exits, confidence = zip(*(answer(image, thresholds) for image in x.split(1)), strict=True)
        taken = torch.tensor(exits)
        return ExitResult(torch.cat(logits), taken, torch.tensor(confidence), net.cost[taken])

    return run


# Every image takes as long, whatever the batch that it comes in.
PEER = Peer("reference, one by one", prepare, torch_version, False, "torch", largest_batch=16)
