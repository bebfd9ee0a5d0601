"""What planning measures with: images to run on, thresholds that choose the exit, a timer that takes turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet

IMAGES, ROUNDS = 8, 3

ROUNDS_ON_CPU, LIMIT, LARGE_MACS = 7, 0.3, 10**9


def noise(n: int, shape: Sequence[int]) -> Tensor:
    """[n, C, H, W] float32, normally distributed, always the same."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))


def images(net: EarlyExitNet, example_inputs: Tensor | None = None) -> Tensor:
    """[IMAGES, C, H, W] float32: the first of `example_inputs`, repeated where there are too few; else noise."""
    if example_inputs is None or len(example_inputs) == 0:
        return noise(IMAGES, net.input_shape)
    return example_inputs.float()[torch.arange(IMAGES) % len(example_inputs)].contiguous()


def thresholds(net: EarlyExitNet, exit_index: int) -> Tensor:
    """[n] float32 thresholds by which every sample exits at this exit."""
    rule = net.criterion
    return torch.tensor([rule.always if i == exit_index else rule.never for i in range(net.num_exits)])


def criterion(net: EarlyExitNet) -> str:
    """The network's, or one that such thresholds are for, too, where that carries: each exit's logits are looked at."""
    return "max_probability" if net.criterion.carries else net.criterion.name


def fastest_of(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each run, the least over rounds in which all take turns."""
    return _least(runs, rounds, time.perf_counter, float("inf"))


def seconds_on_cpu(runs: Sequence[Callable[[], Any]], rounds: int = ROUNDS_ON_CPU) -> list[float]:
    """As `fastest_of`, more often in less time; on one thread of the process, which other processes do not lengthen."""
    return _least(runs, rounds, time.process_time if torch.get_num_threads() == 1 else time.perf_counter, LIMIT)


def _least(runs: Sequence[Callable[[], Any]], rounds: int, clock: Callable[[], float], limit: float) -> list[float]:
    """limit: seconds after which no round begins but the second, since the first one warms up."""
    least, total = [float("inf")] * len(runs), 0.0
    for r in range(rounds):
        if r > 1 and total > limit:
            break
        for i, run in enumerate(runs):
            begin = clock()
            run()
            seconds = clock() - begin
            least[i], total = min(least[i], seconds), total + seconds
    return least


def is_large(net: EarlyExitNet) -> bool:
    """Whether so much is computed for each image that less of it is measured."""
    return sum(cost.stage_macs for cost in net.stage_costs) > LARGE_MACS
