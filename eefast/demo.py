"""The demonstration: one network on real images, every way to run it checked against the others, then timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .api import accelerate
from .calibrate import collect, exits_taken, outcome
from .fold import fold_stage
from .model import EarlyExitNet
from .report import Row
from .result import ExitOutput, ExitResult

# Float32 confidences computed in two ways differ by far less; closer to a threshold either exit is a right answer.
FLIP_MARGIN = 1e-4
LOGIT_TOLERANCE = 1e-3
BATCHES_A_ROUND = 5

Progress = Callable[[str, int, int], None]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Contestant:
    """One way to run the network.

    run: images [n, C, H, W] → `ExitResult`; one without early exits takes the final exit for all.
    criterion: the rule that it exits by, None without early exits.
    images: it answers the first so many images, in calls of `batch_size`.
    """

    name: str
    run: Callable[[Tensor], ExitResult]
    criterion: str | None
    images: int
    batch_size: int


@dataclass(frozen=True)
class Demo:
    """What the demonstration found: the table's rows and the figure's data.

    network: what was run, in words.
    curves: criterion → (mean costs, accuracies), one threshold for all exits going from loose to strict.
    right, wrong: images per exit under the network's own criterion.
    costs: of the exits.
    """

    network: str
    rows: tuple[Row, ...]
    curves: dict[str, tuple[list[float], list[float]]]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    costs: tuple[float, ...]


@torch.no_grad()
def run(
    net: EarlyExitNet,
    others: Mapping[str, Sequence[float]],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    loop_images: int = 500,
    rounds: int = 16,
    progress: Progress = lambda what, done, total: None,
) -> Demo:
    """Answer every image in every way, compare the answers, then time all ways in turn.

    net: in eval mode, with its own criterion and thresholds; others: thresholds of further criteria to show.
    images, labels: [N, C, H, W] and [N]; loop_images: so many of them go through the one-by-one loop.
    progress: called with (what, steps done, steps in all).
    Raises `RuntimeError` where a way disagrees with the reference: a wrong answer gets no speed.
    """
    # The first half of MNIST's test images is easier than the second: mixed, every round sees the same kind.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = net.prepare(images[order]), labels[order]
    nets = {net.criterion.name: net, **{name: net.with_criterion(name, t) for name, t in others.items()}}
    contestants = _contestants(nets, net, len(labels), batch_size, min(loop_images, len(labels)))

    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    outputs, _ = collect(net, _reported(batches, "asking every exit", progress))
    answers = [_answer(contestant, images) for contestant in _reported(contestants, "checking answers", progress)]
    flips = [_flips(c, a, nets, outputs) for c, a in zip(contestants, answers, strict=True)]

    spans = _interleaved(contestants, images, rounds, progress)
    rows = [_row(c, a, labels, f, s, spans[0]) for c, a, f, s in zip(contestants, answers, flips, spans, strict=True)]
    curves = {name: _sweep(outputs, labels, net.cost, nets[name]) for name in nets}
    own = next(a for c, a in zip(contestants, answers, strict=True) if c.criterion and c.images == len(labels))
    right = own.exit_index[own.labels == labels].bincount(minlength=net.num_exits + 1)
    wrong = own.exit_index[own.labels != labels].bincount(minlength=net.num_exits + 1)
    name = f"{(net.config or {}).get('name', 'network')} with {net.num_exits} early exits"
    return Demo(name, tuple(rows), curves, tuple(right.tolist()), tuple(wrong.tolist()), tuple(net.cost.tolist()))


def _contestants(
    nets: Mapping[str, EarlyExitNet], net: EarlyExitNet, n: int, batch_size: int, loop_images: int
) -> list[Contestant]:
    """The plain network first: the others are measured against it; then the loop, which the others must agree with."""
    static, _ = fold_stage(net.plain(), torch.float32)

    def plain(x: Tensor) -> ExitResult:
        logits = static(x.contiguous(memory_format=torch.channels_last))
        last = torch.full((len(x),), net.num_exits)
        return ExitResult(logits, last, torch.ones(len(x)), net.cost[last])

    own = net.criterion.name
    fastest = _fastest_engine(net)
    ways = [("compact", own), *((fastest, name) for name in nets)]
    return [
        Contestant("plain network, no exits", plain, None, n, batch_size),
        Contestant(f"one by one ({loop_images:,} images)", net, own, loop_images, 1),
        Contestant("masked early exit, PyTorch", net, own, n, batch_size),
        *(
            Contestant(f"eefast {engine}, {name}", accelerate(nets[name], engine=engine), name, n, batch_size)
            for engine, name in dict.fromkeys(ways)
        ),
    ]


def _fastest_engine(net: EarlyExitNet) -> str:
    """The resident engine where it can run."""
    try:
        accelerate(net, engine="resident")
    except ValueError:
        return "compact"
    return "resident"


def _reported(items: Sequence[Item], what: str, progress: Progress) -> Iterator[Item]:
    for i, item in enumerate(items):
        progress(what, i, len(items))
        yield item
    progress(what, len(items), len(items))


def _answer(contestant: Contestant, images: Tensor) -> ExitResult:
    parts = [contestant.run(x) for x in images[: contestant.images].split(contestant.batch_size)]
    return ExitResult(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _flips(
    contestant: Contestant,
    answer: ExitResult,
    nets: Mapping[str, EarlyExitNet],
    outputs: Sequence[ExitOutput],
) -> int:
    """Check one way; how many images took another exit than they should, all of them at a threshold's very edge."""
    n = contestant.images
    expected, near = _expected(contestant, nets, outputs, n)
    flipped = answer.exit_index != expected
    logits = torch.stack([out.logits[:n] for out in outputs])[answer.exit_index, torch.arange(n)]
    error = float((answer.logits - logits).abs().max()) if n else 0.0
    if bool((flipped & ~near).any()) or error > LOGIT_TOLERANCE:
        raise RuntimeError(
            f"{contestant.name!r} disagrees with the reference: {int((flipped & ~near).sum())} of {n} images took "
            f"another exit, logits differ by up to {error:.2g}; its speed is not measured"
        )
    return int(flipped.sum())


def _expected(
    contestant: Contestant, nets: Mapping[str, EarlyExitNet], outputs: Sequence[ExitOutput], n: int
) -> tuple[Tensor, Tensor]:
    """First exit that each image leaves at, from what all exits say, and whether it passed close to a threshold."""
    near = torch.zeros(n, dtype=torch.bool)
    if contestant.criterion is None:
        return torch.full((n,), len(outputs) - 1), near
    net = nets[contestant.criterion]
    for out, threshold in zip(outputs[:-1], net.thresholds, strict=True):
        near |= (net.criterion.confidence(out.logits, out.confidence_logit) - threshold).abs()[:n] < FLIP_MARGIN
    return exits_taken(outputs, net.criterion, net.thresholds)[:n], near


@dataclass(frozen=True)
class _Span:
    """One timed stretch: images start … start + count in so many seconds."""

    start: int
    count: int
    seconds: float


def _interleaved(
    contestants: Sequence[Contestant], images: Tensor, rounds: int, progress: Progress
) -> list[list[_Span]]:
    """Every way once per round, so that whatever else the machine does falls on all of them."""
    spans: list[list[_Span]] = [[] for _ in contestants]
    for r in _reported(range(rounds), "timing", progress):
        for contestant, own in zip(contestants, spans, strict=True):
            count = min(BATCHES_A_ROUND * contestant.batch_size, contestant.images)
            count = max(count, contestant.images // rounds) if contestant.batch_size == 1 else count
            start = r * count % (contestant.images - count + 1)
            begin = time.perf_counter()
            for x in images[start : start + count].split(contestant.batch_size):
                contestant.run(x)
            own.append(_Span(start, count, time.perf_counter() - begin))
    return spans


def _row(
    contestant: Contestant, answer: ExitResult, labels: Tensor, flips: int, spans: list[_Span], plain: list[_Span]
) -> Row:
    speeds = [s.count / s.seconds for s in spans]
    ratios = [
        float(answer.cost[s.start : s.start + s.count].mean()) * (p.seconds / p.count) / (s.seconds / s.count)
        for s, p in zip(spans, plain, strict=True)
    ]
    return Row(
        name=contestant.name,
        images_per_s=statistics.median(speeds),
        images_per_s_quantiles=_quantiles(speeds),
        mean_cost=float(answer.cost.mean()),
        accuracy=float((answer.labels == labels[: contestant.images]).float().mean()),
        realised_ratio=statistics.median(ratios),
        images=contestant.images,
        batch_size=contestant.batch_size,
        criterion=contestant.criterion,
        exits=tuple(answer.exit_index.bincount(minlength=1).tolist()),
        flips=flips,
        flip_margin=FLIP_MARGIN,
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.8])).tolist()
    return low, high


def _sweep(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, net: EarlyExitNet
) -> tuple[list[float], list[float]]:
    """Mean costs and accuracies as one threshold for all exits goes through the quantiles of the confidences."""
    values = torch.stack([net.criterion.confidence(out.logits, out.confidence_logit) for out in outputs[:-1]])
    points = []
    for threshold in values.flatten().quantile(torch.linspace(0, 1, 61)).tolist():
        points.append(outcome(outputs, labels, cost, net.criterion.name, [threshold] * net.num_exits))
    points.sort(key=lambda point: point[1])
    return [c for _, c in points], [a for a, _ in points]
