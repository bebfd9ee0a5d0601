"""A network, whole or stage by stage, as ONNX with any batch size; the loop over stages around a runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eefast.measure.baselines import Run, contiguous
from eefast.measure.runtimes import Call, onnx_model
from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage
from eefast.result import ExitResult


def _folded(module: nn.Module) -> Any:
    return contiguous(fold_stage(module, torch.float32)[0])


class _Stage(nn.Module):
    """Features → (logits, confidence) and, but for the last stage, the features of the next one."""

    def __init__(self, net: EarlyExitNet, i: int) -> None:
        super().__init__()
        head: Any = net.heads[i]
        self.head, self.stage, self.convs = head, _folded(net.stages[i]), _folded(head.convs)
        self.confidence, self.last = net.criterion.confidence, i == net.num_exits

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stage(x)
        pooled = self.head.pool(self.head.norm(self.convs(x)))
        logits = self.head.classifier(pooled)
        answer = logits, self.confidence(logits, self.head.confidence(pooled).squeeze(1))
        return answer if self.last else (*answer, x)


@torch.no_grad()
def stages(net: EarlyExitNet) -> Iterator[bytes]:
    """Features → logits, confidence, features of the next stage."""
    x = torch.randn(2, *net.input_shape)
    for i in range(net.num_exits + 1):
        module = _Stage(net, i).eval()
        yield onnx_model(module, x, ["logits", "confidence", "features"][: 2 if module.last else 3])
        x = module.stage(x)


def in_stages(net: EarlyExitNet, calls: Sequence[Call]) -> Run:
    """Stage by stage, the survivors compacted to the batch of the next one. calls: a model per stage."""
    above = net.criterion.comparison == ">"

    def run(x: Tensor) -> ExitResult:
        n, features, thresholds = len(x), x.numpy(), net.thresholds.numpy()
        logits, confidence = np.empty((n, net.num_classes), np.float32), np.empty(n, np.float32)
        exit_index, position = np.empty(n, np.int64), np.arange(n)
        for i, call in enumerate(calls):
            stage_logits, stage_confidence, *more = call(features)
            if i == net.num_exits:
                leaves = np.ones(len(position), bool)
            else:
                leaves = stage_confidence > thresholds[i] if above else stage_confidence < thresholds[i]
            # Copies are made only where some exit and some stay.
            if leaves.any():
                left = position[leaves]
                logits[left], confidence[left], exit_index[left] = stage_logits[leaves], stage_confidence[leaves], i
                position = position[~leaves]
                if len(position) == 0:
                    break
                features = more[0][~leaves]
            else:
                features = more[0]
        exits = torch.from_numpy(exit_index)
        return ExitResult(torch.from_numpy(logits), exits, torch.from_numpy(confidence), net.cost[exits])

    return run
