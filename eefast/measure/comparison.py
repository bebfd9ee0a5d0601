"""A contest of ways to run one network: their answers are checked, then all of them are timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitOutput, ExitResult, concatenated
from ..thresholds.outputs import exits_taken, flip_distances
from .environment import Row

# By dtype: how close to a threshold either exit is a right answer; how far the logits of an image may be off, root mean
# square in standard deviations. Those of another image are off by about 1.4.
FLIP_MARGIN = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-1, torch.bfloat16: 2e-1}

Laid = Mapping[torch.memory_format, Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to run a network.

    run: images [n, C, H, W] → `ExitResult`, or the final exit's logits [n, K] where `net` is None.
    net: the network by whose criterion and thresholds images leave, None without early exits.
    images: it answers the first so many images; batch_size: in calls of so many; turn: so many of them per round.
    memory_format: how the images lie that it is given; dtype: of the arithmetic.
    """

    name: str
    run: Callable[[Tensor], Any]
    net: EarlyExitNet | None
    images: int
    batch_size: int
    turn: int
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Span:
    """One timed stretch: images start … start + count in so many seconds."""

    start: int
    count: int
    seconds: float


def laid(contestants: Sequence[Contestant], images: Tensor) -> Laid:
    """The images [N, C, H, W] in every layout that is wanted."""
    formats = {contestant.memory_format for contestant in contestants}
    return {wanted: images.contiguous(memory_format=wanted) for wanted in formats}


@torch.no_grad()
def answer(contestant: Contestant, images: Laid, outputs: Sequence[ExitOutput], cost: Tensor) -> tuple[ExitResult, int]:
    """Answers to its images, on the CPU, found to be right; how many took another exit than they should.

    outputs: what all exits say about at least these images in float32, see
    `thresholds.outputs.collect`; cost: [n + 1].
    Another exit is right only at a threshold's very edge, see `FLIP_MARGIN`. Raises `RuntimeError` for a wrong answer.
    """
    last, parts = len(outputs) - 1, []
    for x in images[contestant.memory_format][: contestant.images].split(contestant.batch_size):
        found = contestant.run(x)
        if contestant.net is None:
            final = torch.full((len(x),), last)
            found = ExitResult(found, final, torch.ones(len(x)), cost.cpu()[final])
        # Runtimes and CUDA graphs may write the next answer over this one.
        parts.append(ExitResult(*(part.cpu().clone() for part in found)))
    whole = concatenated(parts)
    flips, problem = judge(contestant.net, outputs, whole.logits, whole.exit_index, contestant.dtype)
    if problem:
        raise RuntimeError(f"{contestant.name!r} disagrees with the reference: {problem}; its speed is not measured")
    return whole, flips


def judge(
    net: EarlyExitNet | None, outputs: Sequence[ExitOutput], logits: Tensor, taken: Tensor, dtype: torch.dtype
) -> tuple[int, str]:
    """How many of N images took another exit than they should, and what is wrong with the answers, or nothing.

    net: as in `Contestant`; outputs: of all exits, float32, for the first N images and perhaps more; logits: [N, K];
    taken: [N] int64, exits; dtype: of the arithmetic.
    """
    n, last = len(taken), len(outputs) - 1
    outputs = [ExitOutput(*(part[:n] for part in out)) for out in outputs]
    if net is None:
        flips = wrong = int((taken != last).sum())
    else:
        expected = exits_taken(outputs, net.criterion, net.thresholds.cpu())
        distances = flip_distances(taken, expected, outputs, net)
        flips, wrong = len(distances), int((~(distances < FLIP_MARGIN[dtype])).sum())
    exact = torch.stack([out.logits for out in outputs])[taken, torch.arange(n)]
    error = float((logits.float() - exact).square().mean(1).sqrt().max() / exact.std())
    right = wrong == 0 and error <= LOGIT_TOLERANCE[dtype]
    off = f"logits of one are off by {error:.2g} standard deviations"
    return flips, "" if right else f"{wrong} of {n} images took another exit, {off}"


@torch.no_grad()
def one_round(
    contestants: Sequence[Contestant], images: Laid, number: int, *, pause: float = 0.0, least: float = 0.0
) -> list[Span]:
    """Everybody's turn once, so that whatever else the machine does falls on all; every other round goes backwards.

    pause: seconds of rest before each turn, in which the last one's threads stop spinning, and a call to wake up.
    least: a turn goes over its images again until it has taken so many seconds; what counts is the mean.
    """
    spans: dict[int, Span] = {}
    order = range(len(contestants))
    for i in order if number % 2 == 0 else reversed(order):
        contestant = contestants[i]
        start = number * contestant.turn % (contestant.images - contestant.turn + 1)
        mine = images[contestant.memory_format][start : start + contestant.turn]
        batches = mine.split(contestant.batch_size)
        if pause:
            time.sleep(pause)
            contestant.run(batches[0])
        _wait(mine.device)
        begin, passes, passed = time.perf_counter(), 0, 0.0
        while passes == 0 or passed < least:
            for x in batches:
                contestant.run(x)
            _wait(mine.device)
            passes, passed = passes + 1, time.perf_counter() - begin
        spans[i] = Span(start, contestant.turn, passed / passes)
    return [spans[i] for i in order]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(
    contestant: Contestant,
    answer: ExitResult,
    labels: Tensor,
    flips: int,
    spans: Sequence[Span],
    base: Sequence[Span],
) -> Row:
    """What the rounds tell about one way; base: the rounds of the one that it is measured against."""
    speeds = [s.count / s.seconds for s in spans]
    gains = [(b.seconds / b.count) / (s.seconds / s.count) for s, b in zip(spans, base, strict=True)]
    costs = [float(answer.cost[s.start : s.start + s.count].mean()) for s in spans]
    return Row(
        name=contestant.name,
        images_per_s=statistics.median(speeds),
        images_per_s_quantiles=_quantiles(speeds),
        mean_cost=float(answer.cost.mean()),
        accuracy=float((answer.labels == labels[: contestant.images]).float().mean()),
        realised_ratio=statistics.median(cost * gain for cost, gain in zip(costs, gains, strict=True)),
        images=contestant.images,
        batch_size=contestant.batch_size,
        criterion=None if contestant.net is None else contestant.net.criterion.name,
        exits=tuple(answer.exit_index.bincount(minlength=1).tolist()),
        flips=flips,
        flip_margin=FLIP_MARGIN[contestant.dtype],
        speedup=statistics.median(gains),
        speedup_quantiles=_quantiles(gains),
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.8])).tolist()
    return low, high
