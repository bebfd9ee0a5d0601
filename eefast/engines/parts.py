"""What an engine hands back of some of the stages: answers so far, and the features that go on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..criteria import Criterion, exits_by
from ..model import EarlyExitNet
from ..quantized import QuantizedStage
from ..result import ExitResult


class Before(NamedTuple):
    """Logits [N, K] and confidence [N] float32 of the exit before, the state of a rule that carries."""

    logits: Tensor
    confidence: Tensor


class Part(NamedTuple):
    """Answers of stages first … last, and the features after stage `last` of the samples that no exit has answered.

    result: [N], the answer of the exit that a sample took, or of exit `last` where it goes on.
    rows: [R] int64, ascending, the samples that go on; places: R numbers, where in `features` they are.
    features: [≥ R, C, H, W], of rows [≥ R, C, 1, L], as the network has them or, between the stages of a quantised one,
        their integers uint8.
    The last three are None where `last` is the final exit.
    """

    result: ExitResult
    rows: Tensor | None = None
    places: list[int] | None = None
    features: Tensor | None = None


def going_on(criterion: Criterion, limits: Tensor, exit_index: int, confidence: Tensor, rows: Tensor) -> Tensor:
    """[R] bool: which of the samples `rows` exit `exit_index` does not answer; limits: [n] or [n, N]."""
    limit = limits[exit_index] if limits.dim() == 1 else limits[exit_index, rows]
    return ~exits_by(criterion, confidence, limit)


def part_of(net: EarlyExitNet, last: int, result: ExitResult, rows: Tensor, places: Tensor, features: Tensor) -> Part:
    """The part of an engine that computes between stages in floats, also where a quantised stage made these.

    features: [R, C, H, W] after stage `last`, as that stage returns them; places: [R] int64; the others as of `Part`.
    """
    made_by, features = net.stages[last], features.unsqueeze(2) if features.dim() == 3 else features
    if not isinstance(made_by, QuantizedStage):
        return Part(result, rows, places.tolist(), features)
    broken = features.isnan().flatten(1).any(1)[places]
    answer_broken(net, result, rows[broken])
    scale, zero = made_by.scales[made_by.output], made_by.zeros[made_by.output]
    integers = ((features.float() / scale).round() + zero).nan_to_num().to(torch.uint8)
    return Part(result, rows[~broken], places[~broken].tolist(), integers)


def answer_broken(net: EarlyExitNet, result: ExitResult, rows: Tensor) -> None:
    """Write the answers of images with a NaN to a quantised network: no integer stands for it, so they exit last."""
    result.logits[rows] = float("nan")
    result.confidence[rows] = float("nan")
    result.exit_index[rows] = net.num_exits
    result.cost[rows] = net.cost[-1]


def features_of(net: EarlyExitNet, first: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What stage `first` takes, in `dtype`: x itself or, of integers of a quantised stage, what they stand for."""
    made_by = net.stages[first - 1] if first else None
    if not isinstance(made_by, QuantizedStage):
        return x.to(dtype)
    return made_by.features({made_by.output: x.float()}).to(dtype)
