"""What planning measures with: images to run on, thresholds that choose the exit, a timer that takes turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet

Run = Callable[[], Any]

IMAGES, ROUNDS = 8, 3

ROUNDS_ON_CPU, LIMIT, LARGE_MACS = 7, 0.15, 10**9

REST, RESTS, SHORT = 0.01, 4, 0.05
"""Seconds after which OpenMP's threads of the last run no longer spin beside the next one's; in how many rounds, where
the least counts; seconds of a run from which on that changes little.
"""


def noise(n: int, shape: Sequence[int]) -> Tensor:
    """[n, C, H, W] float32, normally distributed, always the same."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def images(net: EarlyExitNet, example_inputs: Tensor | None = None) -> Tensor:
    """[IMAGES, C, H, W] float32: the first of `example_inputs`, repeated where there are too few; else noise."""
    if example_inputs is None or len(example_inputs) == 0:
        return noise(IMAGES, net.input_shape)
    return example_inputs.float()[torch.arange(IMAGES) % len(example_inputs)].contiguous()


def thresholds(net: EarlyExitNet, exit_index: int) -> Tensor:
    """[n] float32 thresholds by which every sample exits at this exit."""
    rule = net.criterion
    limits = [rule.always if i == exit_index else rule.never for i in range(net.num_exits)]
    return torch.tensor(limits, dtype=torch.float32)


def thresholds_of_each(net: EarlyExitNet, number: int) -> Tensor:
    """[n, number] float32 thresholds by which samples exit at exit 0, 1, … n, 0, 1, …"""
    columns = [thresholds(net, i) for i in range(net.num_exits + 1)]
    return torch.stack(columns, 1)[:, torch.arange(number) % len(columns)]


def criterion(net: EarlyExitNet) -> str:
    """The network's, or one that such thresholds are for, too, where that carries: each exit's logits are looked at."""
    return "max_probability" if net.criterion.carries else net.criterion.name


def fastest_of(runs: Sequence[Run], rounds: int = ROUNDS) -> list[float]:
    """Seconds of each run, the least over rounds in which all take turns."""
    return [min(seconds) for seconds in turns(runs, rounds)]


def seconds_on_cpu(runs: Sequence[Run], rounds: int = ROUNDS_ON_CPU, patience: float = 1.0) -> list[float]:
    """As `fastest_of`, more often in less time; on one thread of the process, which other processes do not lengthen.

    patience: how many times as long as usual rounds may begin.
    """
    return [min(seconds) for seconds in _turns(runs, rounds, _clock_on_cpu(), patience * LIMIT, _rests(RESTS))]


def turns(runs: Sequence[Run], rounds: int = ROUNDS) -> list[list[float]]:
    """As `fastest_of`, the seconds of all rounds."""
    return _turns(runs, rounds, time.perf_counter, float("inf"), 0)


def turns_on_cpu(runs: Sequence[Run], rounds: int = ROUNDS_ON_CPU) -> list[list[float]]:
    """As `seconds_on_cpu`, the seconds of all rounds."""
    return _turns(runs, rounds, _clock_on_cpu(), LIMIT, _rests(rounds))


def usual(seconds: Sequence[float]) -> float:
    """The median of rounds, without the first one where there are others, since that warms up."""
    return statistics.median(seconds[1:] or seconds)


def _clock_on_cpu() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _rests(rounds: int) -> int:
    """In how many rounds runs begin after a rest: on one thread nothing goes on spinning after a run."""
    return rounds if torch.get_num_threads() > 1 else 0


def _turns(runs: Sequence[Run], rounds: int, clock: Callable[[], float], limit: float, rests: int) -> list[list[float]]:
    """limit: seconds after which no round begins but the second, since the first one warms up. rests: rounds after the
    first one in which a run that is short begins after a rest, and once more before it counts, since that woke it up.
    """
    found: list[list[float]] = [[] for _ in runs]
    total = 0.0
    for r in range(rounds):
        if r > 1 and total > limit:
            break
        for seconds, run in zip(found, runs, strict=True):
            if 1 <= r <= rests and seconds[-1] < SHORT:
                time.sleep(REST)
                run()
            begin = clock()
            run()
            seconds.append(clock() - begin)
            total += seconds[-1]
    return found


def is_large(net: EarlyExitNet) -> bool:
    """Whether so much is computed for each image that less of it is measured."""
    return sum(cost.stage_macs for cost in net.stage_costs) > LARGE_MACS
