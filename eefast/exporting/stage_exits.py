"""A network → a module per stage, with the exit after it: features → logits, confidence, features of the next stage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..criteria import carry_numbers
from ..model import EarlyExitNet
from ..planning import probe
from ..planning.inference_copies import inference_copy

INPUTS = ("x", "logits_before", "confidence_before")
OUTPUTS = ("logits", "confidence", "features")


class StageExit(nn.Module):
    """x [N, C, H, W] → logits [N, K] and confidence [N], both float32, and, but for the last stage, the features.

    The confidence is what the criterion compares with the threshold. Where the criterion carries the answer so far,
    stages after the first one also take the logits and the confidence of the exit before.
    """

    def __init__(self, net: EarlyExitNet, i: int) -> None:
        super().__init__()
        self.stage, self.head = inference_copy(net.stages[i]), inference_copy(net.heads[i])
        self.last, self._confidence = i == net.num_exits, net.criterion.confidence
        rule = net.current_rule()
        self.row = rule[i].tolist() if isinstance(rule, Tensor) else None
        self.inputs = INPUTS[: 3 if self.row is not None and i > 0 else 1]
        self.outputs = OUTPUTS[: 2 if self.last else 3]

    def forward(
        self, x: Tensor, logits_before: Tensor | None = None, confidence_before: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        features = self.stage(x)
        logits, _, row = self.head(features)
        if self.row is None:
            answer, value = logits.float(), self._confidence(logits, row)
        else:
            answer, value = carry_numbers(logits, row, self.row, logits_before, confidence_before)
        return (answer, value) if self.last else (answer, value, features)


@torch.no_grad()
def stages_with_examples(net: EarlyExitNet) -> Iterator[tuple[StageExit, tuple[Tensor, ...]]]:
    """Every stage, with what it takes for two images; one image would be taken for a constant batch size."""
    given: tuple[Tensor, ...] = (probe.noise(2, net.input_shape),)
    for i in range(net.num_exits + 1):
        module = StageExit(net, i).eval()
        given = given[: len(module.inputs)]
        yield module, given
        logits, confidence, *features = module(*(tensor.clone() for tensor in given))
        given = (*features, logits, confidence)
