"""One network on real images → every way to run it, checked and timed, and what the demonstration's picture shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..api import accelerate
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system.progress import Progress, counted
from ..thresholds.candidates import candidate_of
from ..thresholds.outputs import collect, outcome
from . import baselines, comparison
from .comparison import Candidate, Row

BATCHES_A_ROUND = 5


@dataclass(frozen=True)
class Demonstration:
    """The table's rows and the figure's data.

    network: what was run, in words.
    curves: criterion → (mean costs, accuracies), one threshold for all exits going from loose to strict.
    right, wrong: number of images per exit under the network's criterion.
    costs: of the exits.
    """

    network: str
    rows: tuple[Row, ...]
    curves: dict[str, tuple[list[float], list[float]]]
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    costs: tuple[float, ...]


@torch.no_grad()
def demonstrate(
    net: EarlyExitNet,
    others: Mapping[str, Sequence[float]],
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 256,
    loop_images: int = 500,
    rounds: int = 16,
    progress: Progress = lambda what, done, total: None,
) -> Demonstration:
    """Let every candidate answer every image, compare the answers, then time all candidates in turns.

    net: in eval mode, with its criterion and thresholds; others: thresholds of further criteria to show.
    images, labels: [N, C, H, W] and [N]; loop_images: number of them that go through the one-by-one loop.
    progress: called with (what, steps done, steps in all).
    Raises `RuntimeError` where a candidate disagrees with the reference: a wrong answer gets no speed.
    """
    # The first half of MNIST's test images is easier than the second: mixed, every round sees the same kind.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = net.prepare(images[order]), labels[order]
    nets = {net.criterion.name: net, **{name: net.with_criterion(name, t) for name, t in others.items()}}
    candidates = _candidates(nets, net, len(labels), batch_size, min(loop_images, len(labels)), rounds)
    by_layout = comparison.by_layout(candidates, images)
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    outputs, _ = collect(
        net, counted(batches, "outputs of all exits", progress, len(labels), lambda batch: len(batch[1]))
    )
    answers = comparison.checked(candidates, by_layout, outputs, net.cost, progress)
    spans = comparison.timed(candidates, by_layout, "timing", progress, rounds=rounds)
    rows = [
        comparison.row(candidate, *answer, labels, turns, spans[0])
        for candidate, answer, turns in zip(candidates, answers, spans, strict=True)
    ]
    early = next(
        answer
        for candidate, (answer, _) in zip(candidates, answers, strict=True)
        if candidate.net is not None and candidate.images == len(labels)
    )
    right, wrong = (
        early.exit_index[part].bincount(minlength=net.num_exits + 1).tolist()
        for part in (early.labels == labels, early.labels != labels)
    )
    curves = {name: _sweep(outputs, labels, net.cost, other) for name, other in nets.items()}
    name = f"{(net.config or {}).get('name', 'network')} with {net.num_exits} early exits"
    return Demonstration(name, tuple(rows), curves, tuple(right), tuple(wrong), tuple(net.cost.tolist()))


def _candidates(
    nets: Mapping[str, EarlyExitNet], net: EarlyExitNet, n: int, batch_size: int, loop_images: int, rounds: int
) -> list[Candidate]:
    """The plain network first: the others are measured against it; then the loop, which the others must agree with."""
    turn, last = min(BATCHES_A_ROUND * batch_size, n), torch.channels_last
    loop_turn = min(max(BATCHES_A_ROUND, loop_images // rounds), loop_images)
    engines = dict.fromkeys([("compact", net.criterion.name), *((_fastest_engine(net), name) for name in nets)])
    return [
        Candidate("plain network, no exits", baselines.eager(net), None, n, batch_size, turn, last),
        Candidate(f"one by one ({loop_images:,} images)", net, net, loop_images, 1, loop_turn),
        Candidate("masked early exit, PyTorch", baselines.masked(net), net, n, batch_size, turn, last),
        *(
            Candidate(
                f"eefast {engine}, {name}", accelerate(nets[name], engine=engine), nets[name], n, batch_size, turn
            )
            for engine, name in engines
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
    candidate = candidate_of(net, net.criterion.name)
    seen = candidate.outputs(outputs)
    values = torch.stack([net.criterion.confidence(out.logits, out.confidence_logit) for out in seen[:-1]])
    points = [
        outcome(seen, labels, cost, candidate.name, [threshold] * net.num_exits)
        for threshold in values.flatten().quantile(torch.linspace(0, 1, 61)).tolist()
    ]
    points.sort(key=lambda point: point[1])
    return [c for _, c in points], [a for a, _ in points]
