"""Rows → figures: every function draws on a given matplotlib Axes and returns it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from rows import Record
from selection import NO_EXITS, OTHER_WORK, OURS, STATIC, Cases, speed

from eefast.measure.figures import plain_numbers

# Of Okabe and Ito's, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, PURPLE, GRAY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7F7F7F"
BARS, CELL_BOUND = 0.38, 2.0


@dataclass(frozen=True)
class Mark:
    """A way to run a network, by its accuracy (0 … 1), speed and mean cost; static: it has no exits."""

    name: str
    static: bool
    accuracy: float
    images_per_s: float
    mean_cost: float


def color(name: str) -> str:
    """Blue is eefast's, gray are the ways without exits, orange are the other ways with exits."""
    return BLUE if name.startswith(OURS) else GRAY if name.startswith(STATIC) else ORANGE


def realised_ratios(axes: Any, cases: Cases, shown: Sequence[tuple[Any, ...]]) -> Any:
    """Two bars per case: the best of eefast, the best of all others.

    cases: (network, batch size, setting) → way → row; shown: those of them to draw, from top to bottom.
    """
    for place, key in enumerate(shown):
        same = {**cases.get((*key[:2], NO_EXITS), {}), **cases[key]}
        others = [row for name, row in same.items() if not name.startswith((OURS, *OTHER_WORK))]
        # eefast in another dtype would be another comparison.
        dtypes = {row["dtype"] for row in others}
        eefast_rows = [row for name, row in cases[key].items() if name.startswith(OURS) and row["dtype"] in dtypes]
        for rows, shade, offset in ((eefast_rows, BLUE, -BARS / 2), (others, GRAY, BARS / 2)):
            best = max(rows, key=speed, default=None)
            value = _ratio(best, cases[key])
            bar = axes.barh(place + offset, value, height=BARS, color=shade)
            label = f"{value:.2f}  {best['provider'] if best else 'not measured'}"
            axes.bar_label(bar, [label], padding=4, fontsize=8, bbox={"color": "white", "linewidth": 0, "pad": 1})
    axes.axvline(1, color="black", linewidth=0.8)
    names = [f"{network}, batch {n}, {setting}" for network, n, setting in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("realised ratio: best of eefast (blue), best of all others (gray); 1 = all that theory promises")
    axes.margins(x=0.35)
    return axes


def _ratio(row: Record | None, ways: Mapping[str, Record]) -> float:
    """Mean cost × time of the best way without exits ÷ time; a way without exits gets that cost for nothing."""
    if row is None or row["realised_ratio"] is None:
        return 0.0
    cost = next((r["mean_cost"] for name, r in ways.items() if not name.startswith(STATIC) and r["mean_cost"]), 1.0)
    return float(row["realised_ratio"]) * (float(cost) if row["provider"].startswith(STATIC) else 1.0)


def speed_ups(axes: Any, cells: Mapping[tuple[int, str], float], sizes: Sequence[int], bound: float) -> Any:
    """A heat map with a number in every cell: blue above 1, red below, blank where nothing was measured.

    cells: (batch size, setting) → speed-up, settings from left to right; sizes: batch sizes from bottom to top; bound:
    > 1, where colours are darkest.
    """
    settings = list(dict.fromkeys(setting for _, setting in cells))
    logs = np.full((len(sizes), len(settings)), np.nan)
    for (n, setting), value in cells.items():
        y, x = sizes.index(n), settings.index(setting)
        logs[y, x] = math.log2(value)
        dark = abs(logs[y, x]) > 0.6 * math.log2(bound)
        number = f"{value:.1f}×" if value >= 9.95 else f"{value:.2f}×"
        axes.text(x, y, number, ha="center", va="center", color="white" if dark else "black", fontsize=10)
    # In logarithms half as fast is as far from white as twice as fast.
    limits = {"vmin": -math.log2(bound), "vmax": math.log2(bound)}
    axes.imshow(logs, cmap="RdBu", origin="lower", aspect="auto", **limits)
    axes.set_xticks(range(len(settings)), [setting.replace(" ", "\n") for setting in settings], fontsize=9)
    axes.set_yticks(range(len(sizes)), [str(n) for n in sizes], fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in np.arange(len(settings) - 1) + 0.5:
        axes.axvline(edge, color="white", linewidth=2)
    for edge in np.arange(len(sizes) - 1) + 0.5:
        axes.axhline(edge, color="white", linewidth=2)
    return axes


def latencies(axes: Any, rows: Sequence[Record]) -> Any:
    """Median and 99 % quantile of the time from an image's arrival to its answer, against the images/s that arrive.

    rows: of the scenario Server, of one network and setting.
    """
    for name, marker in zip(dict.fromkeys(row["provider"] for row in rows), cycle("osD^v"), strict=False):
        by_load = sorted((row for row in rows if row["provider"] == name), key=lambda row: row["offered"])
        for place, style, quantile in ((0, "-", "p50"), (2, "--", "p99")):
            points = [(row["offered"], row["milliseconds"][place]) for row in by_load]
            axes.plot(*zip(*points, strict=True), style, marker=marker, color=color(name), label=f"{name}, {quantile}")
    capacity = next((row["offered"] / row["load"] for row in rows if row["load"]), None)
    if capacity is not None:
        axes.axvline(capacity, color="black", linestyle=":", linewidth=1, label="all that the plain network can do")
    axes.set(xscale="log", yscale="log", xlabel="images/s that arrive", ylabel="ms from arrival to answer")
    plain_numbers(axes.xaxis, "{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    return axes


def accuracy_of_ways(axes: Any, points: Sequence[Mark]) -> Any:
    """A mark per way, the slowest first in the legend: gray without exits, blue eefast's, orange all others."""
    shapes = {shade: cycle("osD^vP*X") for shade in (BLUE, GRAY, ORANGE)}
    for point in sorted(points, key=lambda point: point.images_per_s):
        shade = GRAY if point.static else color(point.name)
        label, style = f"{point.name}: {point.images_per_s:,.0f}", {"color": shade, "markersize": 8, "alpha": 0.8}
        axes.plot(point.images_per_s, 100 * point.accuracy, next(shapes[shade]), label=label, **style)
    axes.set(xscale="log", xlabel="images/s", ylabel="accuracy, %")
    axes.margins(x=0.1, y=0.15)
    axes.tick_params(axis="x", which="minor", labelsize=6)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return axes


def roofline(axes: Any, ops: Sequence[Record], ceilings: Sequence[Record]) -> Any:
    """A mark per measurement of an op under what memory and matrix products allow it.

    ops: rows of ops with flops > 0; ceilings: of the same run, "copy" and "matmul" in any number of dtypes.
    """
    copy = next(row["value"] for row in ceilings if row["ceiling"] == "copy")
    rates = {row["dtype"]: 1e3 * row["value"] for row in ceilings if row["ceiling"] == "matmul"}
    marks = [(row["op"], row["flops"] / row["bytes"], row["flops"] / row["typical"] / 1e3) for row in ops]
    low, high = min(x for _, x, _ in marks) / 2, 4 * max([x for _, x, _ in marks] + [r / copy for r in rates.values()])
    for (dtype, rate), style in zip(rates.items(), cycle(("-", "--", ":")), strict=False):
        label = f"copy {copy:,.0f} GB/s, matrix product {rate:,.0f} GFLOP/s, {dtype}"
        axes.plot([low, rate / copy, high], [copy * low, rate, rate], style, color=GRAY, label=label)
    names = dict.fromkeys(name for name, _, _ in marks)
    for name, marker, shade in zip(names, cycle("osD^"), cycle((BLUE, ORANGE, GREEN, PURPLE)), strict=False):
        points = [(x, y) for op, x, y in marks if op == name]
        axes.plot(*zip(*points, strict=True), marker, color=shade, alpha=0.7, label=name)
    axes.set(xscale="log", yscale="log", xlabel="flops per byte that the work needs", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return axes
