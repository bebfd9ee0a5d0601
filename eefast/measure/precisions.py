"""Outputs of a float32 network and of the quantised one on the same labelled images → what INT8 changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..model import EarlyExitNet
from ..qdq import QdqConvolution
from ..quantized import ALGORITHMS, QuantizedConvolution
from ..result import ExitOutput
from ..thresholds.evaluation import exit_quality
from ..thresholds.outputs import by_thresholds


@dataclass(frozen=True)
class Precision:
    """One network on the images.

    accuracy, mean_cost: under its criterion and thresholds; last_exit_accuracy: of the last exit, all 0 … 1.
    megabytes: of all its parameters and buffers, 10⁶ bytes each.
    """

    accuracy: float
    mean_cost: float
    last_exit_accuracy: float
    megabytes: float


@dataclass(frozen=True)
class PrecisionLoss:
    """Both networks; other_exits, other_classes: share of the images that exit elsewhere, or get another class."""

    float32: Precision
    int8: Precision
    other_exits: float
    other_classes: float


def compare(
    net: EarlyExitNet,
    outputs: Sequence[ExitOutput],
    quantized: EarlyExitNet,
    quantized_outputs: Sequence[ExitOutput],
    labels: Tensor,
) -> PrecisionLoss:
    """outputs, quantized_outputs: of all exits of `net` and of `quantized`, see `thresholds.outputs.collect`."""
    both, answers = [], []
    for network, found in ((net, outputs), (quantized, quantized_outputs)):
        answer = by_thresholds(found, network, network.criterion.name, network.thresholds.tolist())
        right = (answer.labels == labels).double().mean().item()
        last = exit_quality(found[-1:], labels)[0].accuracy
        both.append(Precision(right, answer.cost.double().mean().item(), last, megabytes(network)))
        answers.append(answer)
    before, after = answers
    other_exits = (before.exit_index != after.exit_index).double().mean().item()
    other_classes = (before.labels != after.labels).double().mean().item()
    return PrecisionLoss(both[0], both[1], other_exits, other_classes)


def megabytes(net: EarlyExitNet) -> float:
    """Of all parameters and buffers; those that modules share count once."""
    kept = {id(value): value for value in net.state_dict(keep_vars=True).values()}
    return sum(value.numel() * value.element_size() for value in kept.values()) / 1e6


def algorithms(net: EarlyExitNet) -> dict[str, int]:
    """How many of a quantised network's convolutions are computed in each of the ways `quantized.ALGORITHMS`.

    Where other libraries run its stages: how many in INT8, and how many in float32, those of heads included.
    """
    in_int8 = sum(isinstance(module, QdqConvolution) for module in net.modules())
    if in_int8:
        return {"INT8 by other libraries": in_int8, "float32": sum(isinstance(m, nn.Conv2d) for m in net.modules())}
    used = [module.winograd for module in net.modules() if isinstance(module, QuantizedConvolution)]
    return {name: used.count(winograd) for winograd, name in enumerate(ALGORITHMS)}
