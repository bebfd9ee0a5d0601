"""A network, whole or stage by stage, as ONNX with any batch size; the loop over stages around a runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eefast.measure.baselines import onnx_model
from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage
from eefast.result import ExitResult

from .peer import Run

Call = Callable[[Any], Sequence[Any]]
"""A runtime's model: float32 array → its outputs as arrays."""


class _Stage(nn.Module):
    """Features → (logits, confidence) and, but for the last stage, the features of the next one."""

    def __init__(self, net: EarlyExitNet, i: int) -> None:
        super().__init__()
        head: Any = net.heads[i]
        self.head, self.stage, self.convs = head, folded(net.stages[i]), folded(head.convs)
        self.confidence, self.last = net.criterion.confidence, i == net.num_exits

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stage(x)
        pooled = self.head.pool(self.head.norm(self.convs(x)))
        logits = self.head.classifier(pooled)
        answer = logits, self.confidence(logits, self.head.confidence(pooled).squeeze(1))
        return answer if self.last else (*answer, x)


def folded(module: nn.Module) -> nn.Module:
    """With BatchNorm folded, laid out as ONNX has it."""
    return fold_stage(module, torch.float32)[0].to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


@torch.no_grad()
def stages(net: EarlyExitNet) -> Iterator[bytes]:
    """Features → logits, confidence, features of the next stage."""
    x = torch.randn(2, *net.input_shape)
    for i in range(net.num_exits + 1):
        module = _Stage(net, i).eval()
        yield onnx_model(module, x, ["logits", "confidence", "features"][: 2 if module.last else 3])
        x = module.stage(x)


def in_stages(net: EarlyExitNet, calls: Sequence[Call]) -> Run:
    """Stage by stage, the survivors compacted to the batch of the next one."""
    above = net.criterion.comparison == ">"

    def run(x: Tensor) -> ExitResult:
        n, features, thresholds = len(x), x.numpy(), net.thresholds.numpy()
        logits, confidence = np.empty((n, net.num_classes), np.float32), np.empty(n, np.float32)
        exit_index, position = np.empty(n, np.int64), np.arange(n)
        for i, call in enumerate(calls):
            own_logits, own_confidence, *more = call(features)
            if i == net.num_exits:
                leaves = np.ones(len(position), bool)
            else:
                leaves = own_confidence > thresholds[i] if above else own_confidence < thresholds[i]
            # Copies are made only where some leave and some stay.
            if leaves.any():
                left = position[leaves]
                logits[left], confidence[left], exit_index[left] = own_logits[leaves], own_confidence[leaves], i
                position = position[~leaves]
                if len(position) == 0:
                    break
                features = more[0][~leaves]
            else:
                features = more[0]
        exits = torch.from_numpy(exit_index)
        return ExitResult(torch.from_numpy(logits), exits, torch.from_numpy(confidence), net.cost[exits])

    return run
