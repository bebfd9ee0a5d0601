"""The demonstration: one network on real images, every way to run it checked against the others, then timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import accelerate
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system.progress import Progress, reported
from ..thresholds.outputs import collect, outcome
from . import baselines, comparison
from .comparison import Contestant
from .environment import Row

BATCHES_A_ROUND = 5


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
    contestants = _contestants(nets, net, len(labels), batch_size, min(loop_images, len(labels)), rounds)
    laid = comparison.laid(contestants, images)

    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    outputs, _ = collect(net, reported(batches, "asking every exit", progress))
    checked = [
        comparison.answer(c, laid, outputs, net.cost) for c in reported(contestants, "checking answers", progress)
    ]

    spans = [comparison.one_round(contestants, laid, r) for r in reported(range(rounds), "timing", progress)]
    own_spans = list(zip(*spans, strict=True))
    rows = [
        comparison.row(c, answer, labels, flips, own, own_spans[0])
        for c, (answer, flips), own in zip(contestants, checked, own_spans, strict=True)
    ]
    curves = {name: _sweep(outputs, labels, net.cost, nets[name]) for name in nets}
    own = next(
        a for c, (a, _) in zip(contestants, checked, strict=True) if c.net is not None and c.images == len(labels)
    )
    right = own.exit_index[own.labels == labels].bincount(minlength=net.num_exits + 1)
    wrong = own.exit_index[own.labels != labels].bincount(minlength=net.num_exits + 1)
    name = f"{(net.config or {}).get('name', 'network')} with {net.num_exits} early exits"
    return Demo(name, tuple(rows), curves, tuple(right.tolist()), tuple(wrong.tolist()), tuple(net.cost.tolist()))


def _contestants(
    nets: Mapping[str, EarlyExitNet], net: EarlyExitNet, n: int, batch_size: int, loop_images: int, rounds: int
) -> list[Contestant]:
    """The plain network first: the others are measured against it; then the loop, which the others must agree with."""
    turn = min(BATCHES_A_ROUND * batch_size, n)
    loop_turn = min(max(BATCHES_A_ROUND, loop_images // rounds), loop_images)
    ways = dict.fromkeys([("compact", net.criterion.name), *((_fastest_engine(net), name) for name in nets)])
    return [
        Contestant(
            "plain network, no exits",
            baselines.eager(net),
            None,
            n,
            batch_size,
            turn,
            memory_format=torch.channels_last,
        ),
        Contestant(f"one by one ({loop_images:,} images)", net, net, loop_images, 1, loop_turn),
        Contestant("masked early exit, PyTorch", net, net, n, batch_size, turn),
        *(
            Contestant(
                f"eefast {engine}, {name}", accelerate(nets[name], engine=engine), nets[name], n, batch_size, turn
            )
            for engine, name in ways
        ),
    ]


def _fastest_engine(net: EarlyExitNet) -> str:
    """The resident engine where it can run."""
    try:
        accelerate(net, engine="resident")
    except ValueError:
        return "compact"
    return "resident"


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
