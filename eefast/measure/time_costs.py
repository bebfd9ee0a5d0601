"""Network and images → time to each exit ÷ time without early exits, by the fastest way to run the plain network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..planning.folding import fold_stage
from . import runtimes
from .baselines import Run, contiguous, onnx_runtime_run
from .comparison import in_layout
from .timing import in_turns, mean_seconds

ROUNDS, LEAST_SECONDS, MOST_SECONDS = 7, 0.01, 3.0
"""Rounds, of which one with each way and exit at least is made, and no further one after so many seconds."""


@dataclass(frozen=True)
class TimeCosts:
    """What exits cost in time, as `EarlyExitNet.cost` tells it in MACs.

    way: "PyTorch" or "ONNX Runtime"; batch_size: of each call.
    cost: of each exit, the time of all stages up to it and of its head ÷ that of the plain network; the last is 1.
    """

    way: str
    batch_size: int
    cost: tuple[float, ...]

    def mean(self, images: Sequence[int]) -> float:
        """Of images that exit as told: their number at each exit, at least one in all."""
        return sum(n * c for n, c in zip(images, self.cost, strict=True)) / sum(images)


@torch.no_grad()
def measured(
    net: EarlyExitNet,
    images: Tensor,
    dtype: torch.dtype = torch.float32,
    clock: Callable[[], float] = time.perf_counter,
) -> TimeCosts:
    """Measured in turns, the median over rounds; a later exit never costs less than one before it.

    images: [N, C, H, W], or rows [N, C, L], as `EarlyExitNet.prepare` returns them, one batch, N ≥ 1.
    dtype: of the arithmetic; ONNX Runtime is tried on the CPU in float32, where it is installed.
    Raises `ValueError` for heads that are no `eefast.heads.ExitHead`.
    """
    wait = partial(torch.cuda.synchronize, images.device) if images.is_cuda else lambda: None

    def seconds(calls: Sequence[Callable[[], Any]]) -> list[float]:
        for call in calls:
            call()
        turns, rounds = [partial(mean_seconds, call, LEAST_SECONDS, wait, clock) for call in calls], list[list[float]]()
        while len(rounds) < ROUNDS and (not rounds or sum(map(sum, rounds)) < MOST_SECONDS):
            rounds.append(in_turns(turns, len(rounds)))
        return [statistics.median(spans) for spans in zip(*rounds, strict=True)]

    last = net.num_exits
    ways = _ways(images, dtype)
    whole = seconds([partial(make(net, last), x) for make, x in ways.values()])
    name, (make, x) = list(ways.items())[whole.index(min(whole))]
    found = seconds([partial(make(net, i), x) for i in range(last + 1)])
    cost = torch.tensor(found, dtype=torch.float64).cummax(0).values
    return TimeCosts(name, len(images), tuple((cost / cost[-1]).tolist()))


Way = tuple[Callable[[EarlyExitNet, int], Run], Tensor]
"""(network, exit) → what runs the network up to that exit, and the images in its layout."""


def _ways(images: Tensor, dtype: torch.dtype) -> dict[str, Way]:
    ways: dict[str, Way] = {"PyTorch": (partial(_eager, dtype), in_layout(images.to(dtype), torch.channels_last))}
    if images.device.type == "cpu" and dtype == torch.float32 and not runtimes.missing(runtimes.ONNX_NEEDS):
        ways["ONNX Runtime"] = _onnx, images.float().contiguous()
    return ways


def _eager(dtype: torch.dtype, net: EarlyExitNet, exit_index: int) -> Run:
    return torch.inference_mode()(fold_stage(net.plain(exit_index), dtype)[0])


def _onnx(net: EarlyExitNet, exit_index: int) -> Run:
    module = contiguous(fold_stage(net.plain(exit_index), torch.float32)[0])
    return onnx_runtime_run(runtimes.onnx_model(module, torch.randn(2, *net.input_shape), ["logits"]))
