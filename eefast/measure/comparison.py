"""Candidates that run one network → their answers checked, then a row for each, timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitOutput, ExitResult, concatenated
from ..system.progress import Progress, reported
from ..thresholds.outputs import answered, exits_taken, flip_distances
from .timing import in_turns, mean_seconds, run_all

# By dtype: how close to a threshold either exit is a right answer; how far the logits of an image may be off, root mean
# square in standard deviations. Those of another image are off by about 1.4. The bounds of int8 suit deep networks that
# were never trained; what eight bits change in trained ones is measured by bench/int8_accuracy.py.
FLIP_MARGIN = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1, torch.int8: 4e-1}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-1, torch.bfloat16: 2e-1, torch.int8: 8e-1}
FURTHER_SHARE = {torch.int8: 1e-2}
"""Of the images, may exit further from a threshold: quantisation noise has no largest value. Else none."""

ByLayout = Mapping[torch.memory_format, Tensor]
"""The same images [N, C, H, W] in every layout that a candidate wants."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a network.

    run: images [n, C, H, W] → `ExitResult`, or the final exit's logits [n, K] where `net` is None.
    net: the network by whose criterion and thresholds images exit, None without early exits.
    images: number of images that it answers; batch_size: of each call; turn: number of images per round.
    memory_format: of the images that it is given; dtype: of the arithmetic.
    outputs: of all exits, by which its answers are judged, if they are not those of the network that is compared.
    """

    name: str
    run: Callable[[Tensor], Any]
    net: EarlyExitNet | None
    images: int
    batch_size: int
    turn: int
    memory_format: torch.memory_format = torch.contiguous_format
    dtype: torch.dtype = torch.float32
    outputs: Sequence[ExitOutput] | None = None


@dataclass(frozen=True)
class Span:
    """One timed stretch: the images start … start + count took `seconds`."""

    start: int
    count: int
    seconds: float


@dataclass(frozen=True)
class Row:
    """One candidate, measured.

    images_per_s: median over rounds; images_per_s_quantiles: 20 % and 80 %.
    mean_cost: of the exits taken, 1 = the plain network.
    accuracy: 0 … 1.
    realised_ratio: median over rounds of mean cost × time of the plain network ÷ time of this row, paired in one run.
    images: number of distinct images answered; batch_size: of each call.
    exits: number of images that exited at each exit, n + 1 numbers.
    flips: images whose exit differs from the one-by-one answer, all of them closer to the threshold than `flip_margin`,
        but for `FURTHER_SHARE` of the images.
    speedup: median over rounds of time of the plain network ÷ time of this row; speedup_quantiles: 20 % and 80 %.
    other_classes: of rows in INT8, share of the images that get another class than in float32, 0 … 1.
    """

    name: str
    images_per_s: float
    images_per_s_quantiles: tuple[float, float]
    mean_cost: float
    accuracy: float
    realised_ratio: float
    images: int
    batch_size: int
    criterion: str | None
    exits: tuple[int, ...]
    flips: int
    flip_margin: float
    speedup: float
    speedup_quantiles: tuple[float, float]
    other_classes: float | None = None


def by_layout(candidates: Sequence[Candidate], images: Tensor) -> ByLayout:
    """images: [N, C, H, W], or rows [N, C, L]."""
    return {wanted: in_layout(images, wanted) for wanted in {candidate.memory_format for candidate in candidates}}


def in_layout(images: Tensor, wanted: torch.memory_format) -> Tensor:
    """images: [N, C, H, W], or rows [N, C, L], which have PyTorch's default layout only."""
    return images.contiguous(memory_format=wanted if images.dim() == 4 else torch.contiguous_format)


@torch.no_grad()
def answer(
    candidate: Candidate, images: ByLayout, outputs: Sequence[ExitOutput], cost: Tensor
) -> tuple[ExitResult, int]:
    """Answers to its images, on the CPU, found to be right; how many took another exit than they should.

    outputs: what all exits say about at least these images in float32, see
    `thresholds.outputs.collect`; cost: [n + 1].
    Another exit is right only very near a threshold, see `FLIP_MARGIN` and `FURTHER_SHARE`. Raises `RuntimeError` for a
    wrong answer.
    """
    outputs = outputs if candidate.outputs is None else candidate.outputs
    last, parts = len(outputs) - 1, []
    for x in images[candidate.memory_format][: candidate.images].split(candidate.batch_size):
        found = candidate.run(x)
        if candidate.net is None:
            final = torch.full((len(x),), last)
            found = ExitResult(found, final, torch.ones(len(x)), cost.cpu()[final])
        if len(found.logits) != len(x):
            raise RuntimeError(f"{candidate.name!r} gives {len(found.logits)} answers for {len(x)} images")
        # Runtimes and CUDA graphs may write the next answer over this one.
        parts.append(ExitResult(*(part.cpu().clone() for part in found)))
    whole = concatenated(parts)
    flips, problem = judge(candidate.net, outputs, whole.logits, whole.exit_index, candidate.dtype)
    if problem:
        raise RuntimeError(f"{candidate.name!r} disagrees with the reference: {problem}; its speed is not measured")
    return whole, flips


def judge(
    net: EarlyExitNet | None, outputs: Sequence[ExitOutput], logits: Tensor, taken: Tensor, dtype: torch.dtype
) -> tuple[int, str]:
    """How many of N images took another exit than they should, and what is wrong with the answers, "" if nothing.

    net: as in `Candidate`; outputs: of all exits, float32, for the first N images and perhaps more; logits: [N, K];
    taken: [N] int64, exits; dtype: of the arithmetic.
    """
    n, last = len(taken), len(outputs) - 1
    if len(logits) != n:
        return 0, f"{len(logits)} answers for {n} exits"
    outputs = [ExitOutput(*(part[:n] for part in out)) for out in outputs]
    seen: Sequence[ExitOutput] = outputs
    if net is None:
        flips = wrong = int((taken != last).sum())
    else:
        seen = answered(outputs, net)
        expected = exits_taken(seen, net.criterion, net.thresholds.cpu())
        distances = flip_distances(taken, expected, outputs, net)
        flips, wrong = len(distances), int((~(distances < FLIP_MARGIN[dtype])).sum())
    exact = torch.stack([out.logits for out in seen])[taken, torch.arange(n)]
    error = float((logits.float() - exact).square().mean(1).sqrt().max() / exact.std())
    right = wrong <= FURTHER_SHARE.get(dtype, 0) * n and error <= LOGIT_TOLERANCE[dtype]
    off = f"logits of one are off by {error:.2g} standard deviations"
    return flips, "" if right else f"{wrong} of {n} images took another exit, {off}"


def checked(
    candidates: Sequence[Candidate],
    images: ByLayout,
    outputs: Sequence[ExitOutput],
    cost: Tensor,
    progress: Progress,
) -> list[tuple[ExitResult, int]]:
    """Per candidate its answers and flips, see `answer`; progress: called with (what, done, in all)."""
    waiting = reported(candidates, "checking answers", progress)
    return [answer(candidate, images, outputs, cost) for candidate in waiting]


@torch.no_grad()
def timed(
    candidates: Sequence[Candidate],
    images: ByLayout,
    what: str,
    progress: Progress,
    *,
    rounds: int,
    seconds: float = 0.0,
    pause: float = 0.0,
    least: float = 0.0,
) -> list[list[Span]]:
    """Per candidate a span per round; at least `rounds` rounds, and more until `seconds` have passed.

    pause, least: see `one_round`. progress: called with (`what`, done, in all), rounds or, with `seconds`, these.
    """
    begin, total, done = time.perf_counter(), max(round(seconds), 1) if seconds else rounds, 0
    found: list[list[Span]] = []
    progress(what, 0, total)
    while len(found) < rounds or time.perf_counter() - begin < seconds:
        found.append(one_round(candidates, images, len(found), pause=pause, least=least))
        done = int(time.perf_counter() - begin) if seconds else len(found)
        progress(what, min(done, total), total)
    progress(what, total, total)
    return [list(spans) for spans in zip(*found, strict=True)]


@torch.no_grad()
def one_round(
    candidates: Sequence[Candidate], images: ByLayout, number: int, *, pause: float = 0.0, least: float = 0.0
) -> list[Span]:
    """Each candidate's turn once, see `timing.in_turns`.

    pause: seconds of rest before each turn, in which the last one's threads stop spinning, and a call to wake up.
    least: a turn repeats its images until it has taken this many seconds; what counts is the mean.
    """

    def turn(candidate: Candidate) -> Span:
        start = number * candidate.turn % (candidate.images - candidate.turn + 1)
        part = images[candidate.memory_format][start : start + candidate.turn]
        batches = part.split(candidate.batch_size)
        if pause:
            time.sleep(pause)
            candidate.run(batches[0])
        seconds = mean_seconds(partial(run_all, candidate.run, batches), least, partial(_wait, part.device))
        return Span(start, candidate.turn, seconds)

    return in_turns([partial(turn, candidate) for candidate in candidates], number)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def row(
    candidate: Candidate,
    answer: ExitResult,
    flips: int,
    labels: Tensor,
    spans: Sequence[Span],
    base: Sequence[Span],
) -> Row:
    """spans: of the candidate, one per round; base: in the same rounds, of the one that it is measured against."""
    speeds = [s.count / s.seconds for s in spans]
    gains = [(b.seconds / b.count) / (s.seconds / s.count) for s, b in zip(spans, base, strict=True)]
    exits = 1 if candidate.net is None else candidate.net.num_exits + 1  # without early exits the last one is taken
    costs = [float(answer.cost[s.start : s.start + s.count].mean()) for s in spans]
    return Row(
        name=candidate.name,
        images_per_s=statistics.median(speeds),
        images_per_s_quantiles=_quantiles(speeds),
        mean_cost=float(answer.cost.mean()),
        accuracy=float((answer.labels == labels[: candidate.images]).float().mean()),
        realised_ratio=statistics.median(cost * gain for cost, gain in zip(costs, gains, strict=True)),
        images=candidate.images,
        batch_size=candidate.batch_size,
        criterion=None if candidate.net is None else candidate.net.criterion.name,
        exits=tuple(answer.exit_index.bincount(minlength=exits).tolist()),
        flips=flips,
        flip_margin=FLIP_MARGIN[candidate.dtype],
        speedup=statistics.median(gains),
        speedup_quantiles=_quantiles(gains),
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.8])).tolist()
    return low, high
