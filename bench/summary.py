"""Rows of measurements → text for a terminal: the page's tables, what must be reached, where eefast loses."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import page_tables
from page_tables import or_blank
from rows import RESULTS, Record, read
from selection import (
    OURS,
    cases_of,
    in_one_thread,
    measured_networks,
    newest_int8,
    newest_latency,
    newest_networks,
    newest_ops,
    on_backbone,
    op_name,
    speed,
)
from targets import int8_checks, network_checks, op_checks

from eefast.measure import tables

UNITS = {"copy": "GB/s", "matmul": "TFLOP/s"}
FIGURES = (
    *(
        ("ratio", "realised_ratio", "{:.2f}"),
        ("mean cost", "mean_cost", "{:.3f}"),
        ("in time", "time_cost", "{:.3f}"),
        ("host waits", "host_waits", "{}"),
    ),
    *(("GPU idle", "launch_gaps", "{:.0%}"), ("GB", "gigabytes", "{:.2f}"), ("J/image", "joules_per_image", "{:.2g}")),
)
"""Title, name in a row, how it is written."""

aligned = partial(tables.aligned, numbers=True)


def show(rows: Sequence[Record], lines: int = 200) -> str:
    """The newest row of each measurement, as text of at most `lines` lines per device."""
    devices: dict[tuple[str, bool], list[Record]] = {}
    for row in rows:
        devices.setdefault((row["environment"]["device"], in_one_thread(row)), []).append(row)
    return "\n\n".join(_device(part, lines) for part in devices.values())


def failures(rows: Sequence[Record]) -> bool:
    """Whether an answer was wrong, or eefast's ops did not run."""
    return any(r["note"].startswith("WRONG") or ("op" in r and _broken(r)) for r in rows if r.get("note"))


def _broken(row: Record) -> bool:
    return row["provider"] == OURS and not row["note"].startswith("skipped")


def _device(rows: list[Record], lines: int) -> str:
    around = rows[-1]["environment"]
    gpu = around["cuda"] is not None
    found = [f"{around['device']}, " + ", ".join(_versions(around, gpu))]
    ceilings = {(r["ceiling"], r["dtype"]): r["value"] for r in rows if r.get("ceiling") in UNITS}
    if ceilings:
        found.append("; ".join(f"{what} {dtype} {v:,.1f} {UNITS[what]}" for (what, dtype), v in ceilings.items()))
    networks, ops = newest_networks(rows), newest_ops(rows)
    settings = [row for row in networks if row["setting"] and row["images_per_s"]]
    ends = [*_notes([*ops, *networks, *newest_latency(rows)]), *(op_checks(ops, gpu, lines // 4) if ops else [])]
    ends += network_checks(cases_of(settings), gpu, lines // 4) if settings else []
    ends += int8_checks(newest_int8(rows))
    zoo = [row for row in rows if not on_backbone(row)]
    body = _ways_table(zoo) if gpu else _network_tables(zoo)
    body += page_tables.backbone_table(rows, aligned)
    body += [*page_tables.precision_table(rows, aligned), *page_tables.int8_table(rows, aligned)]
    body += [*page_tables.latency_table(rows, aligned), *page_tables.op_table(rows, aligned)]
    room = max(lines - len(found) - len(ends), 3)
    if len(body) > room:
        body = [*body[: room - 1], f"… {len(body) - room + 1} more lines: bench/summary.py --lines 200"]
    return "\n".join([*found, *body, *ends])


def _versions(around: Record, gpu: bool) -> list[str]:
    names = ("driver", "cuda", "torch", "triton") if gpu else ("torch", "capability", "threads", "cpp_kernels")
    return [*(f"{name} {around.get(name)}" for name in (*names, "python", "commit", "load")), around["date"]]


def _network_tables(rows: Sequence[Record]) -> list[str]:
    found = page_tables.network_tables(rows, aligned).items()
    return [line for network, table in found for line in (f"{network}: images/s (realised ratio)", *table)]


def _ways_table(rows: Sequence[Record]) -> list[str]:
    """One line per way, in blocks of one network, batch size and setting, those with the most images/s first."""
    lines: list[Sequence[str]] = []
    for (network, batch_size, setting), ways in cases_of(measured_networks(rows)).items():
        for name, row in sorted(ways.items(), key=lambda way: -speed(way[1])):
            figures = {**row, "gigabytes": row["peak_memory"] and row["peak_memory"] / 1e9}
            cells = [or_blank(figures[figure], form) for _, figure, form in FIGURES]
            lines.append((network, str(batch_size), setting, name, f"{speed(row):,.0f}", *cells))
    titles = ("network", "batch", "setting", "way", "images/s, median", *(title for title, *_ in FIGURES))
    return aligned(titles, lines) if lines else []


def _notes(rows: Iterable[Record]) -> list[str]:
    """What was not timed and why, wrong answers first, the same reason once."""
    reasons: Counter[str] = Counter()
    names: dict[str, str] = {}
    for row in rows:
        if row["note"]:
            reasons[row["note"]] += 1
            names.setdefault(row["note"], f"{_where(row)}, {row['provider']}")
    ordered = sorted(reasons, key=lambda note: not note.startswith("WRONG"))
    more = {note: f" and {count - 1} more" if count > 1 else "" for note, count in reasons.items()}
    return [f"! {note} ({names[note]}{more[note]})" for note in ordered]


def _where(row: Record) -> str:
    if "op" in row:
        return op_name(row)
    if "scenario" in row:
        return f"{row['model']}, {row['setting']}, {row['scenario']}"
    return ", ".join(filter(None, (f"{row['network']}, batch {row['batch_size']}", row["setting"])))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="rows; default: bench/results/*.jsonl")
    parser.add_argument("--since", default="", metavar="DATE", help="only rows of this ISO date (UTC) or later")
    parser.add_argument("--lines", type=int, default=60, help="number of lines per device, at most; default 60")
    arguments = parser.parse_args()
    rows = read(arguments.files or sorted(RESULTS.glob("*.jsonl")), arguments.since)
    print(show(rows, arguments.lines) if rows else "no rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
