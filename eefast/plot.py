"""Figures: every function draws on a given matplotlib Axes and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def accuracy_against_cost(
    axes: Any,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    points: Mapping[str, tuple[float, float]],
) -> Any:
    """A line per criterion over its thresholds and a marker per operating point.

    curves: name → (mean costs, accuracies 0 … 1); points: name → (mean cost, accuracy).
    """
    for name, (costs, accuracies) in curves.items():
        axes.plot(costs, [100 * a for a in accuracies], label=name)
    for (name, (cost, accuracy)), marker in zip(points.items(), "osD^v*", strict=False):
        axes.plot(cost, 100 * accuracy, marker, color="black", markersize=6, label=name)
    best = max(max(accuracies) for _, accuracies in curves.values())
    axes.set(xlabel="mean cost (1 = plain network)", ylabel="accuracy, %", ylim=(100 * best - 4, 100 * best + 0.3))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
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
