"""Rows of measurements → the tables of the page of benchmarks, which a run prints too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rows import Record
from selection import (
    AUTO,
    COMPACT,
    NO_EXITS,
    ORDER,
    OURS,
    PER_STAGE,
    RESIDENT,
    RESIDENT_INT8,
    beside,
    cases_of,
    measured_networks,
    newest_int8,
    newest_latency,
    newest_ops,
    on_backbone,
    speed,
)

Table = Callable[[Sequence[str], Iterable[Sequence[str]]], list[str]]
"""Titles, rows → lines."""

LATENCY_TITLES = (
    *("network", "scenario", "way", "load", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "batch"),
)
PRECISION_TITLES = (
    *("network", "batch", "setting", "best static float", "best static int8", RESIDENT, RESIDENT_INT8),
    *("float ÷ float", "int8 ÷ int8", "float ÷ static int8", "int8 ÷ static float", "other answers"),
)
INT8_TITLES = (
    *("network", "way", "thresholds", "accuracy", "mean cost", "exit elsewhere", "other answers", "last exit alone"),
    "details",
)
TIME_TITLES = ("network", "batch", "setting", "way", "cost in MACs", "cost in time", "realised", "× time ÷ MACs")
BACKBONE_WAYS = (AUTO, COMPACT, PER_STAGE, "OpenVINO per stage")
OP_TITLES = ("op", "maps", "dtype", "leave", "µs", "× eager", "share of the bound")


def network_tables(rows: Sequence[Record], table: Table) -> dict[str, list[str]]:
    """Network → a line per way, a column per batch size and setting: images/s and realised ratio."""
    measured, found = measured_networks(rows), {}
    cases = cases_of(measured)
    for network in dict.fromkeys(row["network"] for row in measured):
        columns = dict(sorted(((key[1:], ways) for key, ways in cases.items() if key[0] == network), key=_place))
        names = sorted(dict.fromkeys(name for ways in columns.values() for name in ways), key=_order)
        titles = ["way", *(f"batch {n}, {setting}" for n, setting in columns)]
        found[network] = table(
            titles, [[name, *(_cell(ways.get(name)) for ways in columns.values())] for name in names]
        )
    return found


def _order(name: str) -> tuple[bool, int]:
    return name.startswith(OURS), ORDER.index(name) if name in ORDER else len(ORDER)


def _place(case: tuple[tuple[Any, ...], dict[str, Record]]) -> tuple[Any, ...]:
    """Of a column: large batches first, in each the more expensive setting."""
    (batch_size, setting), ways = case
    return -batch_size, setting != NO_EXITS, -min(row["mean_cost"] for row in ways.values())


def _cell(row: Record | None) -> str:
    if row is None:
        return ""
    # Of a way whose batches exit together the cost says nothing about theory.
    stated = row["realised_ratio"] is not None and not row["provider"].startswith("earlyon")
    return f"{speed(row):,.0f}" + (f" ({row['realised_ratio']:.2f})" if stated else "")


def time_table(rows: Sequence[Record], table: Table) -> list[str]:
    """What exits cost in MACs and in time, where both were measured: of each case eefast's fastest float way.

    The last column is the realised ratio as if costs were those in time: what the loop and its kernels make of them.
    """
    lines = []
    for (network, batch_size, setting), ways in cases_of(measured_networks(rows)).items():
        ours = [r for r in ways.values() if r["provider"].startswith(OURS) and r["time_cost"] and r["mean_cost"] < 1]
        if not ours or not (best := max(ours, key=speed))["realised_ratio"]:
            continue
        costs, ratio = (best["mean_cost"], best["time_cost"]), best["realised_ratio"]
        figures = (*costs, ratio, ratio * costs[1] / costs[0])
        lines.append([network, str(batch_size), setting, best["provider"], *(f"{value:.2f}" for value in figures)])
    return table(TIME_TITLES, lines) if lines else []


def precision_table(rows: Sequence[Record], table: Table) -> list[str]:
    """Where both were measured: the resident engine and the best ways without exits, in float and in int8.

    Ratios are realised ones: mean cost × time of the static way ÷ time.
    """
    lines = []
    for (network, batch_size, setting), ways in cases_of(measured_networks(rows)).items():
        ours = ways.get(RESIDENT), ways.get(RESIDENT_INT8)
        if ours[0] is None or ours[1] is None or ours[1]["across_static"] is None:
            continue
        ratios = [row[name] for name in ("realised_ratio", "across_ratio") for row in ours if row]
        count = sum(ours[1]["exits"])
        lines.append(
            [
                *(network, str(batch_size), setting, ours[0]["best_static"], ours[1]["best_static"] or ""),
                *(f"{speed(row):,.0f}" for row in ours if row),
                *(or_blank(ratio, "{:.2f}") for ratio in ratios),
                f"{ours[1]['other_answers'] / count:.1%}",
            ]
        )
    return table(PRECISION_TITLES, lines) if lines else []


def backbone_table(rows: Sequence[Record], table: Table) -> list[str]:
    """A line per network, batch size and cost: the best way without exits, then realised ratios; nothing without any.

    Planning: seconds of the engine chosen by default until its first answer, in the run's first case of the network.
    """
    cases = cases_of(measured_networks(row for row in rows if on_backbone(row)))
    planning: dict[str, float] = {}
    for (network, *_), ways in cases.items():
        planning[network] = max(planning.get(network, 0.0), (AUTO in ways and ways[AUTO]["setup_seconds"]) or 0.0)
    lines = []
    for (network, batch_size, setting), ways in cases.items():
        same = beside(cases, network, batch_size, setting)
        best = same.get(next(iter(ways.values()))["best_static"])
        shown = (ways.get(name) for name in BACKBONE_WAYS)
        first = AUTO in ways and ways[AUTO]["setup_seconds"] == planning[network] > 0
        lines.append(
            [
                *(network, str(batch_size), setting),
                *((best["provider"], f"{speed(best):,.1f}") if best else ("", "")),
                *(f"{or_blank(r['realised_ratio'], '{:.2f}')} ({speed(r):,.1f}/s)" if r else "" for r in shown),
                f"{planning[network]:.1f}" if first else "",
            ]
        )
    titles = ("network", "batch", "setting", "best without exits", "its images/s", *BACKBONE_WAYS, "planning, s")
    return table(titles, lines) if lines else []


def int8_table(rows: Sequence[Record], table: Table) -> list[str]:
    """What eight bits change in trained networks; nothing where none was measured."""
    lines = [
        [
            *(f"{row['quantized']}, {row['criterion']}", row["way"], row["origin"], f"{row['accuracy']:.2%}"),
            f"{row['mean_cost']:.2%}",
            *(f"{row[name] / row['images']:.2%}" for name in ("elsewhere", "other_answers")),
            *(f"{row['last_accuracy']:.2%}", row["details"]),
        ]
        for row in newest_int8(rows)
    ]
    return table(INT8_TITLES, lines) if lines else []


def latency_table(rows: Sequence[Record], table: Table) -> list[str]:
    """Nothing where none was timed."""
    lines = [_latency_cells(row) for row in newest_latency(rows) if not row["note"]]
    return table(LATENCY_TITLES, lines) if lines else []


def _latency_cells(row: Record) -> list[str]:
    numbers = (row["load"], row["offered"], row["images_per_s"], *(row["milliseconds"] or (None,) * 3), row["batch"])
    forms = ("{:.2f}", "{:,.0f}", "{:,.0f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}")
    cells = ["" if number is None else form.format(number) for number, form in zip(numbers, forms, strict=True)]
    return [f"{row['model']}, {row['setting']}", row["scenario"], row["provider"], *cells]


def op_table(rows: Sequence[Record], table: Table) -> list[str]:
    """The exit ops against eager PyTorch; nothing where none was timed."""
    ops = [row for row in newest_ops(rows) if row["provider"] == OURS and row["typical"]]
    return table(OP_TITLES, map(_op_cells, ops)) if ops else []


def _op_cells(row: Record) -> list[str]:
    return [
        f"{row['op']}{' in a graph' if row['timing'] == 'graph' else ''}",
        f"{row['samples']} × {row['channels']}×{row['height']}×{row['width']}, K = {row['classes']}"
        + (f", {row['criterion']}" if row.get("criterion") else ""),
        row["dtype"],
        f"{row['exit_rate']:.0%}",
        f"{row['typical']:,.1f}",
        *(or_blank(row[name], form) for name, form in (("speedup", "{:.1f}"), ("bound_share", "{:.0%}"))),
    ]


def or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
