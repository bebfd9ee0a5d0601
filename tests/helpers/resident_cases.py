"""What the resident CUDA kernel must answer: plain PyTorch, maps and weights rounded as on the GPU, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from networks import lived_in
from torch import Tensor, nn

from eefast import ops
from eefast.heads import ExitHead
from eefast.model import EarlyExitNet
from eefast.planning.layers import Lowered
from eefast.zoo.resnets import BasicBlock


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    confidence: Tensor
    exits: Tensor
    fault: str | None

    def same_bits(self, other: Answer) -> bool:
        pairs = ((self.logits, other.logits), (self.confidence, other.confidence))
        same = all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in pairs)
        return same and torch.equal(self.exits, other.exits) and self.fault == other.fault


@torch.no_grad()
def exits_of(lowered: Lowered, x: Tensor, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Logits and confidence logit of every exit, in float32, maps and weights rounded to `dtype` as on the GPU."""

    def stored(value: Tensor) -> Tensor:
        return value.to(dtype).float()

    values, found = {0: stored(x)}, []
    for layer in lowered.layers:
        source = values[layer.source]
        if layer.kind == ops.Kind.EXIT:
            out = F.linear(source.mean((2, 3)), layer.weight, layer.bias)
            found.append((out[:, :-1], out[:, -1]))
            continue
        if layer.kind == ops.Kind.CONVOLUTION:
            value = F.conv2d(source, stored(layer.weight), layer.bias, layer.stride, layer.padding)
            value = value + (values[layer.residual] if layer.residual >= 0 else 0)
        else:
            value = source * layer.weight[:, None, None] + layer.bias[:, None, None]
        values[layer.target] = stored(value.relu() if layer.activation else value)
    return found


def expected(net: EarlyExitNet, exits: list[tuple[Tensor, Tensor]], thresholds: Tensor) -> Answer:
    """Every image by the first exit whose rule it meets, in a plain loop."""
    rows = []
    for n in range(len(exits[0][0])):
        for i, (logits, row) in enumerate(exits):
            confidence = net.criterion.confidence(logits[n : n + 1], row[n : n + 1])
            if i == net.num_exits or bool(net.criterion.leaves(confidence, thresholds[i])):
                rows.append((logits[n], confidence[0], torch.tensor(i)))
                break
    return Answer(*map(torch.stack, zip(*rows, strict=True)), None)  # type: ignore[arg-type]


def never(net: EarlyExitNet) -> Tensor:
    """Thresholds that no sample passes."""
    return torch.full((net.num_exits,), -1.0 if net.criterion.comparison == "<" else 1e9)


def forced(net: EarlyExitNet, at: int) -> Tensor:
    """Thresholds by which every sample exits at one exit."""
    limits = never(net)
    limits[at : at + 1] = 1e9 if net.criterion.comparison == "<" else -1.0
    return limits


def small(blocks: int, classes: int, shape: tuple[int, int, int], head: str, seed: int) -> EarlyExitNet:
    """A 6n+2 network of any depth, an exit after every block."""
    conv = nn.Conv2d(shape[0], 16, 3, padding=1, bias=False)
    stages: list[nn.Module] = []
    heads, size, width = [], shape[1:], 16
    for group in range(3):
        for i in range(blocks):
            stride = 2 if group and i == 0 else 1
            stages.append(BasicBlock(width, 16 << group, stride))
            width, size = 16 << group, tuple((side - 1) // stride + 1 for side in size)
            heads.append(ExitHead(head, (width, *size), classes, shape))
    stages[0] = nn.Sequential(conv, nn.BatchNorm2d(16), nn.ReLU(inplace=True), stages[0])
    return lived_in(EarlyExitNet(stages, heads, input_shape=shape), seed)


def check(got: Answer, want: Answer, dtype: torch.dtype) -> None:
    """The same exits, NaN at the same places; sums in another order now and then round to the next number."""
    assert got.fault is None
    assert torch.equal(got.exits, want.exits)
    scale = max(1.0, float(want.logits.nan_to_num().abs().max()))
    tolerance = scale * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=tolerance, equal_nan=True)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=0, atol=tolerance, equal_nan=True)
