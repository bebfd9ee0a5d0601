"""Rows of trained networks → which goals they reach, and how smaller plain networks compare at their cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from data_sets import CIFAR10_JPEG
from rows import Record, seed_of, trained_name
from selection import newest

from eefast.measure.tables import markdown

Point = tuple[float, float]
"""Mean cost, accuracy."""

# Data set → network ("": every one) → accuracy lost to the twin at most, at this mean cost.
GOALS: dict[str, dict[str, tuple[tuple[float, float], ...]]] = {
    CIFAR10_JPEG: {
        "eenet20": ((0.005, 0.45), (0.015, 0.30)),
        "eenet32": ((0.005, 0.45), (0.015, 0.30)),
        "eenet110": ((0.005, 0.25), (0.005, 0.20)),
    },
    "fashion-mnist": {"": ((0.005, 0.30),)},
    "mnist": {"": ((0.002, 0.12),)},
}
SMALLER_UP_TO = 0.6
"""The cost up to which a network with exits is to be more accurate than smaller plain networks."""


def accuracy_at(curve: Sequence[Sequence[float]], cost: float) -> float | None:
    """Accuracy of the most expensive thresholds within `cost`, of (accuracy, mean cost) by ascending cost; None: none.

    Thresholds on the curve were chosen on held-out images, where more cost never means less accuracy.
    """
    place = bisect_right([c for _, c in curve], cost)
    return curve[place - 1][0] if place else None


def goals_of(dataset: str, model: str) -> Sequence[tuple[float, float]]:
    """(accuracy lost at most, mean cost) of a network."""
    known = GOALS.get(dataset, {})
    return known.get(model, known.get("", ()))


def goal_table(rows: Sequence[Record]) -> list[str]:
    """A line per goal of each row."""
    lines = []
    for row in rows:
        found = [(row.get("allowed_cost"), row.get("at_cost")), *(row.get("at_goals") or ())]
        chosen = {cost: (point["accuracy"], point["cost"]) for cost, point in found if point}
        for drop, cost in goals_of(row["training"], row["model"]):
            # Rows of before have points of the curve alone, which leave some of the cost unused.
            accuracy, spent = chosen.get(cost) or (accuracy_at(row["curve"], cost), cost)
            lost = None if accuracy is None else row["twin_accuracy"] - accuracy
            reached = lost is not None and lost <= drop + 1e-9 and spent <= cost + 1e-9
            cells = [f"{100 * lost:.2f}" if lost is not None else "–", f"{spent:.3f}" if cost in chosen else "–"]
            wanted = f"≤ {100 * drop:.1f} at ≤ {cost:.2f}"
            lines.append(
                (trained_name(row), row["criterion"], *cells, wanted, "reached" if reached else "**not reached**")
            )
    return markdown(("network", "criterion", "lost", "mean cost", "to be reached", ""), lines) if lines else []


def plain_points(rows: Sequence[Record], row: Record) -> dict[str, Point]:
    """Name → point of the smaller plain networks on the data set of `row`, in costs of its network; the cheapest first.

    rows: all of them; those of plain networks and other devices are told apart here. Where some were trained with its
        seed, these alone.
    """
    if not row.get("macs"):  # a row from before they were counted
        return {}
    device = row["environment"]["device"]
    plain = [
        {**r, "device": device}
        for r in rows
        if "plain" in r and r["trained_on"] == row["training"] and r["environment"]["device"] == device
    ]
    plain = [r for r in plain if seed_of(r) == seed_of(row)] or plain
    found = {r["plain"]: (r["macs"] / row["macs"], r["accuracy"]) for r in newest(plain, ("device", "plain"))}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def advantage(curve: Sequence[Sequence[float]], points: Sequence[Point]) -> tuple[float, float] | None:
    """Smallest lead of a curve of (accuracy, mean cost) over plain networks and the cost where it is; None: no overlap.

    points: of plain networks by ascending cost and accuracy; of several at a cost, the best counts. Between two of them
    accuracy is taken to grow evenly with cost. Costs above `SMALLER_UP_TO` do not count.
    """
    leads = []
    for (low, worse), (high, better) in pairwise(dict(points).items()):
        for accuracy, cost in curve:
            if low <= cost <= min(high, SMALLER_UP_TO):
                leads.append((accuracy - worse - (better - worse) * (cost - low) / (high - low), cost))
    return min(leads, default=None)


def plain_table(row: Record, points: dict[str, Point]) -> list[str]:
    """A line per smaller plain network, and whether the network of `row` is above all of them."""
    lines = []
    for name, (cost, accuracy) in points.items():
        ours = accuracy_at(row["curve"], cost)
        cells = ["–", "–"] if ours is None else [f"{100 * ours:.2f}", f"{100 * (ours - accuracy):+.2f}"]
        lines.append((name, f"{cost:.3f}", f"{100 * accuracy:.2f}", *cells))
    if not lines:
        return []
    least = advantage(row["curve"], [*points.values(), (1.0, row["twin_accuracy"])])
    verdict = "At no cost up to it both were measured."
    if least is not None:
        reached = "above" if least[0] > 0 else "**not above**"
        verdict = (
            f"{reached} them everywhere, and above the lines between them; the smallest lead over these lines is "
            f"{100 * least[0]:+.2f} points, at cost {least[1]:.3f}."
        )
    return [
        *markdown(("plain network, trained as the twin", "cost", "accuracy, %", "with exits, %", "lead"), lines),
        "",
        f"Up to cost {SMALLER_UP_TO}: {verdict}",
        "",
    ]
