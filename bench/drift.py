"""A trained network and its data → cost and accuracy while test images drift, of fixed thresholds and of eefast.online.

The test images come once each, in a random order: first as they are, then ever more turned and blurred, then all by the
same. Thresholds, path and profiles come from held-out images as they are; no way sees a label of a test image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from command import run_command
from int8_accuracy import name_of, parser_of, with_data
from progress import track
from rows import RESULTS, DriftRow, append, environment, slug
from torch import Tensor

import eefast
from eefast.measure.tables import aligned
from eefast.model import EarlyExitNet
from eefast.online import UCB, BudgetController
from eefast.result import ExitResult

CRITERION, BATCH_SIZE, TARGET, PRICE = "max_probability", 100, 0.1, 0.1
DEGREES, SIGMA = 30.0, 1.0
"""Of the images that have drifted most."""
BEGINS, ENDS = 0.4, 0.5
"""Of the drift, as shares of the batches."""
COSTS = {"eco": 0.08, "normal": 0.1, "careful": 0.15}
"""Profiles of the bandit, by their cost on held-out images; beside them "full", which has no early exit."""


class Stream(NamedTuple):
    """Batches of images as the network takes them, with labels and how far each has drifted, 0 … 1."""

    images: list[Tensor]
    labels: list[Tensor]
    strength: list[float]


class Way(NamedTuple):
    """A way to answer a stream: a batch → its answers and the profile, "" for none."""

    name: str
    answer: Callable[[Tensor], tuple[ExitResult, str]]
    target: float | None = None
    price: float | None = None

    def __str__(self) -> str:
        return self.name


def drifted(pixels: Tensor, strength: float) -> Tensor:
    """uint8 images [N, C, H, W], turned and blurred; 0: as they are."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    if strength == 0:
        return pixels
    turned = F.rotate(pixels, DEGREES * strength, InterpolationMode.BILINEAR)
    return F.gaussian_blur(turned, [7, 7], [SIGMA * strength] * 2)


def stream_of(pixels: Tensor, labels: Tensor, batch_size: int) -> Stream:
    """All images in a random order, the same each time."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = order.split(batch_size)
    begins, ends = BEGINS * len(parts), ENDS * len(parts)
    strength = [min(max((i - begins) / (ends - begins), 0.0), 1.0) for i in range(len(parts))]
    images = [drifted(pixels[part], s) for part, s in zip(parts, strength, strict=True)]
    return Stream(images, [labels[part] for part in parts], strength)


def ways(net: EarlyExitNet, controller: BudgetController, price: float) -> list[Way]:
    """What is compared; the controller's path is also that of the fixed thresholds and of the profiles."""
    rows = {name: controller.path[int((controller.costs - cost).abs().argmin())] for name, cost in COSTS.items()}
    net.profiles = {"full": controller.path[0], **rows}
    bandit, fast, first = UCB(net.profiles, price), eefast.accelerate(net), controller.thresholds

    def by_budget(images: Tensor) -> tuple[ExitResult, str]:
        result = fast(images, thresholds=controller.thresholds)
        controller.update(result)
        return result, ""

    def by_bandit(images: Tensor) -> tuple[ExitResult, str]:
        profile = bandit.choose()
        result = fast(images, profile=profile)
        bandit.update(result)
        return result, profile

    return [
        Way("no early exit", lambda images: (fast(images, profile="full"), "")),
        Way("fixed thresholds", lambda images: (fast(images, thresholds=first), ""), controller.target),
        Way("budget", by_budget, controller.target),
        Way("bandit", by_bandit, price=price),
    ]


def measured(name: str, way: Way, stream: Stream) -> DriftRow:
    """One way on the stream."""
    answers = [way.answer(images) for images in stream.images]
    figures = [
        (float((r.labels == labels).double().mean()), float(r.cost.double().mean()), float(r.confidence.mean()))
        for (r, _), labels in zip(answers, stream.labels, strict=True)
    ]
    accuracy, cost, confidence = zip(*figures, strict=True)

    def mean(strength: float) -> tuple[float, float, float]:
        part = torch.tensor([f for f, s in zip(figures, stream.strength, strict=True) if s == strength])
        a, b, c = part.double().mean(dim=0).tolist()
        return a, b, c

    return DriftRow(
        drifting=name,
        way=way.name,
        criterion=CRITERION,
        batch_size=len(stream.labels[0]),
        target=way.target,
        price=way.price,
        turned=tuple(DEGREES * s for s in stream.strength),
        blurred=tuple(SIGMA * s for s in stream.strength),
        accuracy=accuracy,
        cost=cost,
        confidence=confidence,
        before=mean(0.0),
        after=mean(1.0),
        profiles=tuple(profile for _, profile in answers if profile),
    )


def table(rows: Sequence[DriftRow]) -> list[str]:
    """A line per way."""
    title = ["way", *(f"{what}, {when}" for when in ("before", "after") for what in ("accuracy", "cost", "confidence"))]
    lines = [[row.way, *(f"{value:.4f}" for value in (*row.before, *row.after))] for row in rows]
    return aligned(title, lines, numbers=True)


def draw(rows: Sequence[DriftRow], path: Path, window: int = 5) -> None:
    """Cost, accuracy and confidence - accuracy over time, means of `window` batches, a line per way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for row in rows:
        over = [100 * (c - a) for c, a in zip(row.confidence, row.accuracy, strict=True)]
        for each, values in zip(axes, (row.cost, [100 * a for a in row.accuracy], over), strict=True):
            means = torch.tensor(values, dtype=torch.float64).unfold(0, window, 1).mean(dim=1).tolist()
            images = [(i + window) * row.batch_size for i in range(len(means))]
            each.plot(images, means, label=row.way)
    begin, end = (row.batch_size * sum(t < most for t in row.turned) for most in (1e-9, DEGREES))
    for each, name in zip(axes, ("mean cost", "accuracy, %", "confidence - accuracy, points"), strict=True):
        each.axvspan(begin, end, color="gray", alpha=0.2, label="drift sets in")
        each.set(ylabel=name)
        each.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[0].axhline(TARGET, color="black", linewidth=0.8, linestyle=":", label="target")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    axes[-1].set(xlabel=f"images; each point is the mean of {window * rows[0].batch_size}")
    figure.suptitle(f"{rows[0].drifting}, turned by {DEGREES:g}° and blurred (σ = {SIGMA:g} pixels)")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = parser_of(__doc__)
    arguments = parser.parse_args()
    around = environment("cpu")
    for net, held_out, test in with_data(arguments.networks, arguments.data_root):
        outputs = held_out.outputs(net, "held out")
        controller = BudgetController.from_outputs(outputs, held_out.labels, net.cost, CRITERION, TARGET)
        stream, name = stream_of(test.pixels, test.labels, BATCH_SIZE), name_of(net)
        compared = ways(net.with_criterion(CRITERION).eval(), controller, PRICE)
        figure = f"drift-{slug(' '.join([name, around['device']]))}.png"
        rows = [measured(name, way, stream) for way in track(compared, "drift")]
        append(rows, around)
        draw(rows, RESULTS / figure)
        print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    run_command(main)
