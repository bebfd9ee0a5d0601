"""Figures: every function draws on a given matplotlib Axes, or SubFigure, and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor


def accuracy_against_cost(
    axes: Any,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[float, float]],
) -> Any:
    """A line per criterion over its thresholds and a marker per operating point or static network.

    curves: name → (mean costs, accuracies 0 … 1); points: name → (mean cost, accuracy).
    The accuracies shown end 4 points below the best, or at the lowest marker.
    """
    for name, (costs, accuracies) in curves.items():
        axes.plot(costs, [100 * a for a in accuracies], label=name)
    for (name, (cost, accuracy)), marker in zip(points.items(), cycle("osD^v*"), strict=False):
        axes.plot(cost, 100 * accuracy, marker, color="black", markersize=6, label=name)
    best = max([max(accuracies) for _, accuracies in curves.values()] + [a for _, a in points.values()])
    lowest = min([best - 0.04, *(a - 0.003 for _, a in points.values())])
    axes.set(xlabel="mean cost (1 = plain network)", ylabel="accuracy, %", ylim=(100 * lowest, 100 * best + 0.3))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return axes


def exit_histogram(axes: Any, right: Sequence[int], wrong: Sequence[int], costs: Sequence[float]) -> Any:
    """A bar per exit, right and wrong answers stacked, with the exit's cost beside its number."""
    labels = [f"exit {i}\ncost {cost:.2f}" for i, cost in enumerate(costs)]
    axes.bar(labels, right, label="right", color="tab:green")
    bars = axes.bar(labels, wrong, bottom=right, label="wrong", color="tab:red")
    axes.bar_label(bars, [f"{r + w:,}\n({w} wrong)" for r, w in zip(right, wrong, strict=True)], padding=2, fontsize=9)
    axes.set(ylabel="images", ylim=(0, 1.18 * max(r + w for r, w in zip(right, wrong, strict=True))))
    axes.legend()
    return axes


def speedup_over_batch_size(axes: Any, speedups: Mapping[str, Mapping[int, float]], static: Sequence[str]) -> Any:
    """A line per way to run a network, dashed without early exits, beside the fastest of these, which is 1.

    speedups: way → batch size → time of the fastest static way ÷ time of this one. static: ways without early exits.
    """
    sizes = sorted({size for by_size in speedups.values() for size in by_size})
    for i, (name, by_size) in enumerate(speedups.items()):
        style = "--" if name in static else "-"
        axes.plot(
            sorted(by_size), [by_size[size] for size in sorted(by_size)], style, color=f"C{i}", marker="o", label=name
        )
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="batch size", ylabel="speed ÷ fastest way without early exits", xscale="log", yscale="log")
    plain_numbers(axes.yaxis, "{x:g}")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    # Room for the names above the lines.
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.3)
    axes.legend(fontsize=8, loc="upper center", ncols=2)
    return axes


def accuracy_against_speed(
    axes: Any,
    points: Mapping[str, tuple[float, float]],
    static: Sequence[str],
    curve: Sequence[tuple[float, float]],
    curve_name: str,
) -> Any:
    """A marker per way to run a network, hollow without early exits, and a line over other thresholds of one of them.

    points: way → (images/s, accuracy 0 … 1); curve: such pairs, in order. Colours as in `speedup_over_batch_size`.
    """
    if curve:
        speeds, accuracies = zip(*curve, strict=True)
        axes.plot(speeds, [100 * a for a in accuracies], ".-", color="grey", label=curve_name)
    for i, (name, (speed, accuracy)) in enumerate(points.items()):
        fill = "none" if name in static else f"C{i}"
        axes.plot(speed, 100 * accuracy, "o", color=f"C{i}", markerfacecolor=fill, markersize=8, label=name)
    shown = [100 * accuracy for _, accuracy in [*points.values(), *curve]]
    margin = max(0.3, 0.1 * (max(shown) - min(shown)))
    axes.set(xlabel="images/s", ylabel="accuracy, %", xscale="log", ylim=(min(shown) - margin, max(shown) + margin))
    plain_numbers(axes.xaxis, "{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return axes


def plain_numbers(axis: Any, form: str) -> None:
    """1, 2, 5, 10 … beside a logarithmic axis, instead of powers of ten."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter(form))
    axis.set_minor_formatter(ticker.NullFormatter())


def examples(
    figure: Any,
    images: Tensor,
    labels: Tensor,
    answers: Tensor,
    exit_index: Tensor,
    costs: Sequence[float],
    each: int,
    names: Sequence[str] | None = None,
) -> Any:
    """A row of images per exit that has some: the first ones answered right, class after class, then wrong ones.

    figure: a matplotlib Figure or SubFigure. images: [N, C, H, W] uint8, C 1 or 3. labels, answers, exit_index: [N]
    int64. costs: of the n + 1 exits. each: number of right images, and of wrong ones. Under a wrong one:
    answer ≠ label, by the names of the classes where there are some.
    """
    # A narrow empty column between right and wrong.
    widths = [1.0] * each + [0.3] + [1.0] * each
    some = [i for i in range(len(costs)) if (exit_index == i).any()] or [len(costs) - 1]
    grid = figure.subplots(len(some), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    shown = names or [str(label) for label in range(int(max(labels.max(), answers.max())) + 1)]
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.patch.set_visible(False)
        # Places without an image are as large as those with one.
        axes.set_box_aspect(images.shape[2] / images.shape[3])
    for i, row in zip(some, grid, strict=True):
        taken = exit_index == i
        for first, wanted in ((0, answers == labels), (each + 1, answers != labels)):
            rows = _spread(labels, (taken & wanted).nonzero().flatten(), each)
            for axes, at in zip(row[first:], rows, strict=False):
                # Matplotlib wants colours last, and grey images without them.
                axes.imshow(images[at].permute(1, 2, 0).squeeze(2).numpy(), cmap="gray_r", vmin=0, vmax=255)
                if answers[at] != labels[at]:
                    wrong = f"{shown[int(answers[at])][:12]} ≠ {shown[int(labels[at])][:12]}"
                    axes.set_xlabel(wrong, color="tab:red", fontsize=8 if names is None else 6, labelpad=1)
        row[0].set_ylabel(f"exit {i}\ncost {costs[i]:.2f}", rotation=0, ha="right", va="center", fontsize=9)
    for first, title, color in ((0, "right", "tab:green"), (each + 1, "wrong: answer ≠ label", "tab:red")):
        # A title would make the column as wide as its words.
        heading = grid[0][first].text(0, 1.1, title, transform=grid[0][first].transAxes, fontsize=10, color=color)
        heading.set_in_layout(False)
    return figure


def _spread(labels: Tensor, rows: Tensor, count: int) -> list[int]:
    """The first `count` rows, taken from all classes in turn."""
    turns = torch.zeros_like(rows)
    for label in labels[rows].unique():
        same = labels[rows] == label
        turns[same] = torch.arange(int(same.sum()))
    order = (turns * (int(labels.max()) + 1) + labels[rows]).argsort() if len(rows) else rows
    return sorted(rows[order][:count].tolist(), key=lambda row: int(labels[row]))
