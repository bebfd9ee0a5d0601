"""Rows of measurements → a table for people, what must be reached, and where eefast loses."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import RESULTS, read

Row = dict[str, Any]

OURS = "eefast"
# The names of ways to run a network without its exits begin so.
STATIC = "plain"
BASELINES = ("eager", "x[mask]")
PLAIN = ("plain copy", "plain read")
CASE = ("op", "samples", "channels", "height", "width", "classes", "dtype", "layout", "criterion", "exit_rate")
NETWORK = ("network", "batch_size", "dtype", "mix")
SETTING = ("network", "batch_size", "setting")
LATENCY = ("model", "setting", "most")
LATENCY_TITLES = (
    *("network", "scenario", "way", "load", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms", "batch"),
)
RESIDENT, COMPACT, PER_STAGE = "eefast resident", "eefast compact", "ONNX Runtime per stage"
COMPILED = "plain, torch.compile"
OTHER_WORK = ("fewer blocks", "earlyon")
"""Another network, and one whose batches leave together or not at all: no rivals."""
NO_EXITS, OWN_THRESHOLDS = "no exits", "own thresholds"
HEADINGS = {
    "plain, eager": "eager",
    "plain, eager, memory kept": "eager, kept",
    "plain, torch.compile": "torch.compile",
    "plain, ONNX Runtime": "ONNX Runtime",
    "plain, OpenVINO": "OpenVINO",
    "plain, eager NCHW": "eager NCHW",
    "plain, OpenVINO bfloat16": "OpenVINO bf16",
    "fewer blocks, ONNX Runtime": "fewer blocks",
    "reference, one by one": "one by one",
    "masked, PyTorch": "masked",
    "earlyon, batched": "earlyon",
    "masked, PyTorch folded": "folded",
    "masked, PyTorch folded, memory kept": "folded, kept",
    **{f"BatchCond, {mode}": f"BatchCond {mode}" for mode in ("padding", "splitting", "table")},
    **{f"torch.compile {how}": f"compiled {how}" for how in ("on the loop", "per stage", "full graph")},
    "ONNX Runtime per stage": "ONNX R. stages",
    "ONNX Runtime per stage, shared threads": "shared threads",
    "OpenVINO per stage": "OpenVINO stages",
    "ONNX Runtime, one graph": "ONNX R. graph",
    "OpenVINO, one graph": "OpenVINO graph",
    "eefast compact": "compact",
    "eefast compact, memory kept": "compact, kept",
    "eefast resident": "resident",
    "eefast resident, bfloat16": "bfloat16",
    "eefast resident, avx2": "AVX2",
    "eefast resident, direct": "direct",
}
COLUMNS = (
    *(("realised_ratio", "{:.2f}"), ("mean_cost", "{:.3f}")),
    *(("host_waits", "{}"), ("launch_gaps", "{:.0%}"), ("gigabytes", "{:.2f}"), ("joules_per_image", "{:.2g}")),
)
# From here on, inputs are several times as large as any cache.
MEMORY_BOUND = {"gpu": 2**28, "cpu": 2**27}


@dataclass(frozen=True)
class Target:
    """What a way must reach in all of its cases.

    least: realised ratio; with `against` images/s ÷ those of the fastest way whose name begins so.
    batch_sizes, costs: from … to, both included; costs as asked for, 1: no image leaves early, None: own thresholds.
    times_cost: with `against`, times the mean cost, which makes it a realised ratio against that way.
    gpu: where it is to be reached.
    """

    text: str
    least: float
    provider: str = RESIDENT
    networks: tuple[str, ...] = ("eenet20", "eenet110")
    batch_sizes: tuple[int, float] = (256, float("inf"))
    costs: tuple[float, float] | None = (0.2, 0.35)
    against: str = ""
    times_cost: bool = False
    gpu: bool = False

    def concerns(self, row: Row) -> bool:
        here = row["network"] in self.networks and row["provider"] == self.provider
        cost = _cost_asked_for(row["setting"])
        asked = cost == self.costs if self.costs is None or cost is None else self.costs[0] <= cost <= self.costs[1]
        return here and asked and self.batch_sizes[0] <= row["batch_size"] <= self.batch_sizes[1]


def _cost_asked_for(setting: str) -> float | None:
    if setting == OWN_THRESHOLDS:
        return None
    return 1.0 if setting == NO_EXITS else float(setting.removeprefix("cost "))


TARGETS = (
    Target("resident: realised ratio ≥ 2.2 at N ≥ 256, cost .2–.35", 2.2),
    Target("resident: realised ratio ≥ 1.9 at N = 16, cost .2–.35", 1.9, batch_sizes=(16, 16)),
    Target("resident: realised ratio ≥ 1.5 at N = 1, cost .2–.35", 1.5, batch_sizes=(1, 1)),
    Target("resident: ≥ 2.0 × the best static way at N ≥ 256 where no image leaves early", 2.0, costs=(1, 1)),
    Target("resident held to AVX2: realised ratio ≥ 1.4 at N ≥ 256, cost .2–.35", 1.4, f"{RESIDENT}, avx2"),
    Target(f"resident: ≥ 2.2 × {PER_STAGE} at N ≥ 256, cost .2–.35", 2.2, against=PER_STAGE),
    Target(
        "resident: realised ratio ≥ 1.9 on MNIST at N ≥ 256, the network's own thresholds",
        1.9,
        networks=("eenet32 on MNIST",),
        costs=None,
    ),
    *(
        Target(
            f"compact: {network}, N = {n}, {what} ≥ {least} × torch.compile, with or without CUDA graph",
            least,
            COMPACT,
            (network.split(" ")[0],),
            (n, n),
            (cost, cost),
            COMPILED,
            times_cost=True,
            gpu=True,
        )
        for network, n, cost, what, least in (
            ("eenet50 at 224", 256, 0.4, "cost .4: realised ratio", 0.95),
            ("eenet50 at 224", 256, 1.0, "no image leaves early:", 1.2),
            ("eenet50 at 224", 32, 0.4, "cost .4: realised ratio", 0.8),
            ("eenet18 at 64", 1024, 0.3, "cost .3: realised ratio", 0.9),
        )
    ),
)


def show(rows: Sequence[Row], lines: int = 200) -> str:
    """The newest row of each measurement, as text of at most so many lines per device."""
    devices = dict.fromkeys(row["environment"]["device"] for row in rows)
    return "\n\n".join(_device([r for r in rows if r["environment"]["device"] == d], lines) for d in devices)


def failures(rows: Sequence[Row]) -> bool:
    """Whether an answer was wrong, or eefast's ops did not run."""
    return any(r["note"].startswith("WRONG") or ("op" in r and _broken(r)) for r in rows if r.get("note"))


def _broken(row: Row) -> bool:
    return row["provider"] == OURS and not row["note"].startswith("skipped")


def _device(rows: list[Row], lines: int) -> str:
    around = rows[-1]["environment"]
    gpu = around["cuda"] is not None
    ceilings = {(r["ceiling"], r["dtype"]): r["value"] for r in rows if "ceiling" in r}
    found = [f"{around['device']}, " + ", ".join(_versions(around, gpu))]
    units = {"copy": "GB/s", "matmul": "TFLOP/s", "multiply-adds of one core": "billions/s"}
    if ceilings:
        found.append("; ".join(f"{what} {dtype} {v:,.1f} {units[what]}" for (what, dtype), v in ceilings.items()))
    ops = _newest((r for r in rows if "op" in r), (*CASE, "provider", "timing"))
    networks = newest_networks(rows)
    settings = [r for r in networks if r.get("setting") and r["images_per_s"]]
    latency = newest_latency(rows)
    ends = [*_notes([*ops, *networks, *latency]), *(_checks(ops, gpu, lines // 4) if ops else [])]
    ends += _setting_checks(settings, gpu, lines // 4) if settings else []
    body = _ways_table(settings) if gpu else _setting_tables(settings)
    body += [*_network_table([r for r in networks if not r.get("setting")]), *_latency_table(latency)]
    body += _op_table(ops)
    room = max(lines - len(found) - len(ends), 3)
    if len(body) > room:
        body = [*body[: room - 1], f"… {len(body) - room + 1} more lines: bench/report.py --lines 200"]
    return "\n".join([*found, *body, *ends])


def _versions(around: Row, gpu: bool) -> list[str]:
    names = ("driver", "cuda", "torch", "triton") if gpu else ("torch", "capability", "threads", "cpp_kernels")
    return [*(f"{name} {around.get(name)}" for name in (*names, "python", "commit", "load")), around["date"]]


def _newest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each measurement."""
    return list({tuple(str(row.get(name)) for name in key): row for row in rows}.values())


def newest_networks(rows: Iterable[Row]) -> list[Row]:
    """Of each network, batch size, way and setting; a network trained anew has another mix of exits in the same one."""
    found: dict[tuple[str, ...], Row] = {}
    for row in (row for row in rows if "network" in row):
        setting = row.get("setting") or str(row["mix"])
        found[row["network"], str(row["batch_size"]), row["dtype"], setting, row["provider"]] = row
    return list(found.values())


def newest_latency(rows: Iterable[Row]) -> list[Row]:
    """Per network, setting and largest batch all rows of the last run: loads differ a little between runs."""
    served = [row for row in rows if "scenario" in row]
    run = {tuple(row[name] for name in LATENCY): row["environment"]["date"] for row in served}
    last = [row for row in served if row["environment"]["date"] == run[tuple(row[name] for name in LATENCY)]]
    return sorted(last, key=lambda row: (*(row[name] for name in LATENCY), row["scenario"], row["load"] or 0))


def latency_cells(row: Row) -> list[str]:
    """What stands under `LATENCY_TITLES`; blank where nothing was measured."""
    numbers = (row["load"], row["offered"], row["images_per_s"], *(row["milliseconds"] or (None,) * 3), row["batch"])
    forms = ("{:.2f}", "{:,.0f}", "{:,.0f}", "{:.2f}", "{:.2f}", "{:.2f}", "{:.1f}")
    cells = ["" if number is None else form.format(number) for number, form in zip(numbers, forms, strict=True)]
    return [f"{row['model']}, {row['setting']}", row["scenario"], row["provider"], *cells]


def _latency_table(rows: list[Row]) -> list[str]:
    table = [LATENCY_TITLES, *(tuple(latency_cells(row)) for row in rows if not row["note"])]
    return _aligned(table) if len(table) > 1 else []


def _op_table(rows: list[Row]) -> list[str]:
    """One line per case: eefast, the baseline and the best of the other ways."""
    cases: dict[tuple[Any, ...], dict[tuple[str, str], Row]] = {}
    for row in rows:
        if row["microseconds"]:
            cases.setdefault(_case(row), {})[row["provider"], row["timing"]] = row
    table = [
        ("typical µs per call", "eefast", "in graph", "eager", "best other", "", "× eager", "GB/s", "copy", "bound")
    ]
    for case, ways in cases.items():
        ours, graph = ways.get((OURS, "launch")), ways.get((OURS, "graph"))
        eager = next((row for (name, _), row in ways.items() if name in BASELINES), None)
        others = [r for r in ways.values() if r["provider"] not in (OURS, *PLAIN, *BASELINES)]
        best = min(others, key=_typical, default=None)
        device = graph or ours
        table.append(
            (
                _name(dict(zip(CASE, case, strict=True))),
                *(f"{_typical(row):,.1f}" if row else "" for row in (ours, graph, eager, best)),
                f"{best['provider']}{', in graph' if best['timing'] == 'graph' else ''}" if best else "",
                _number(ours, "speedup", "{:.1f}"),
                _number(device, "gigabytes_per_s", "{:,.0f}"),
                *(_number(device, name, "{:.0%}") for name in ("copy_share", "bound_share")),
            )
        )
    return _aligned(table) if len(table) > 1 else []


def _network_table(rows: list[Row]) -> list[str]:
    """One line per network, batch size and mix of exits: the best way without exits, early-exit ways; images/s."""
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if row["images_per_s"]:
            cases.setdefault(tuple(str(row[name]) for name in NETWORK), {})[row["provider"]] = row
    early = ("masked, PyTorch", "eefast compact", "eefast resident", "eefast resident, streaming")
    titles = [title for name in early for title in (name.split(", ")[-1].removeprefix("eefast "), "ratio")]
    titles[0] = "masked"
    table = [("images/s, median", "batch", "plain", "the best way", *titles, "mean cost")]
    for case, ways in cases.items():
        found = [ways.get(name) for name in early]
        best = ways.get(next(iter(ways.values()))["best_static"])
        tried = sum(name.startswith(STATIC) for name in ways)
        names = f"{best['provider'].removeprefix('plain, ')} (of {tried})" if best else ""
        numbers = [_speed(best), names]
        for row in found:
            numbers += [_speed(row), _number(row, "realised_ratio", "{:.2f}")]
        cost = next((row for row in found if row), None)
        table.append((f"{case[0]} {case[2]}", case[1], *numbers, _number(cost, "mean_cost", "{:.3f}")))
    return _aligned(table) if len(table) > 1 else []


def _setting_tables(rows: list[Row]) -> list[str]:
    """Networks × batch sizes, one column per way: without exits, then with exits, one line per cost."""
    without = [row for row in rows if row["setting"] == NO_EXITS]
    return [
        *_setting_table("no exits: images/s (× best static)", without),
        *_setting_table("images/s (realised ratio)", [row for row in rows if row["setting"] != NO_EXITS]),
    ]


def _setting_table(title: str, rows: list[Row]) -> list[str]:
    ways = [name for name in HEADINGS if any(row["provider"] == name for row in rows)]
    table = [(title, "batch", "mean cost", *(HEADINGS[name] for name in ways))]
    for (network, batch_size, setting), found in _by_setting(rows).items():
        cost = next((r["mean_cost"] for r in found.values() if r["dtype"] == "float32"), None)
        cells = [_speed(found.get(name)) + _number(found.get(name), "realised_ratio", " ({:.2f})") for name in ways]
        own = f"{network}, {setting}" if setting == OWN_THRESHOLDS else network
        table.append((own, str(batch_size), "" if cost is None else f"{cost:.3f}", *cells))
    return _aligned(table) if rows else []


def _ways_table(rows: list[Row]) -> list[str]:
    """One line per way, in blocks of one network, batch size and setting, those with the most images/s first."""
    numbers = ("images/s", "ratio", "mean cost", "host waits", "GPU idle", "GB", "J/image")
    table: list[tuple[str, ...]] = [("images/s, median", "batch", "setting", "way", *numbers)]
    for (network, batch_size, setting), ways in _by_setting(rows).items():
        for name, row in sorted(ways.items(), key=lambda way: -way[1]["images_per_s"][1]):
            # Rows from before these were measured do not name them.
            row = {"host_waits": None, "launch_gaps": None, "joules_per_image": None, **row}
            row["gigabytes"] = row["peak_memory"] / 1e9 if row.get("peak_memory") else None
            cells = [_number(row, *column) for column in COLUMNS]
            table.append((network, str(batch_size), setting, name, _speed(row), *cells))
    return _aligned(table) if rows else []


def _by_setting(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    cases: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in SETTING), {})[row["provider"]] = row
    return cases


def _setting_checks(rows: list[Row], gpu: bool, lines: int) -> list[str]:
    """What the design asks of whole networks, reached or not, and every case in which another way is faster."""
    cases, found = _by_setting(rows), []
    for target in (t for t in TARGETS if t.gpu == gpu):
        values = []
        for (network, batch_size, setting), ways in cases.items():
            row = ways.get(target.provider)
            if row is None or not target.concerns(row):
                continue
            value = row["realised_ratio"]
            if target.against:
                others = [r["images_per_s"][1] for name, r in ways.items() if name.startswith(target.against)]
                times = row["mean_cost"] if target.times_cost else 1
                value = times * row["images_per_s"][1] / max(others) if others else None
            if value is not None:
                values.append((value, f"{network}, batch {batch_size}, {setting}"))
        reached, worst = sum(v >= target.least for v, _ in values), min(values, default=None)
        seen = worst and f"{reached} of {len(values)} cases; the lowest {worst[0]:.2f} at {worst[1]}"
        found.append(_verdict(target.text, worst and reached == len(values), seen))
    return [*found, *_setting_losses(cases, COMPACT if gpu else RESIDENT, lines)]


def _setting_losses(cases: dict[tuple[Any, ...], dict[str, Row]], own: str, lines: int) -> list[str]:
    """Against all other ways at the same setting, and those without exits."""
    lost, ours = [], 0
    for (network, batch_size, setting), ways in cases.items():
        if own not in ways:
            continue
        ours += 1
        same = {**cases.get((network, batch_size, NO_EXITS), {}), **ways}
        # Another network, other exits than those asked for, or another dtype would be another comparison.
        fair = {name: row for name, row in same.items() if row["dtype"] == ways[own]["dtype"]}
        others = {name: row for name, row in fair.items() if not name.startswith((OURS, *OTHER_WORK))}
        best = max(others.values(), key=lambda row: row["images_per_s"][1], default=None)
        if best and best["images_per_s"][1] > ways[own]["images_per_s"][1]:
            ratio = best["images_per_s"][1] / ways[own]["images_per_s"][1]
            lost.append((ratio, f"  {network}, batch {batch_size}, {setting}: {best['provider']} is {ratio:.2f}×"))
    found = [f"{own} is slower than another way in {len(lost)} of {ours} cases{':' if lost else ''}"]
    return [*found, *(text for _, text in sorted(lost, reverse=True)[:lines])]


def _speed(row: Row | None) -> str:
    return "" if row is None else f"{row['images_per_s'][1]:,.0f}"


def _notes(rows: list[Row]) -> list[str]:
    """What was not timed and why, wrong answers first, the same reason once."""
    reasons = Counter()
    names: dict[str, str] = {}
    for row in rows:
        if row["note"]:
            reasons[row["note"]] += 1
            names.setdefault(row["note"], f"{_where(row)}, {row['provider']}")
    ordered = sorted(reasons, key=lambda note: not note.startswith("WRONG"))
    more = {note: f" and {count - 1} more" if count > 1 else "" for note, count in reasons.items()}
    return [f"! {note} ({names[note]}{more[note]})" for note in ordered]


def _where(row: Row) -> str:
    if "op" in row:
        return _name(row)
    if "scenario" in row:
        return f"{row['model']}, {row['setting']}, {row['scenario']}"
    return ", ".join(filter(None, (f"{row['network']}, batch {row['batch_size']}", row.get("setting"))))


def _checks(rows: list[Row], gpu: bool, lines: int) -> list[str]:
    """What the design asks of the ops, reached or not, and every case in which another way is faster."""
    ours = [r for r in rows if r["provider"] == OURS and r["microseconds"]]
    target = {"op": "exit_head", "channels": 64, "height": 8, "width": 8, "classes": 10, "layout": "channels_last"}
    target |= {"criterion": "learned", "exit_rate": 0.5}
    target |= {"samples": 4096, "dtype": "float16"} if gpu else {"samples": 256, "dtype": "float32"}
    at_target = {r["timing"]: r for r in ours if all(r[name] == value for name, value in target.items())}
    graph, launch = at_target.get("graph"), at_target.get("launch")
    found = []
    if gpu:
        text = "≤ 10 µs at N = 4096, C = 64, 8×8, float16 (in a graph, workspace cleared in it; inputs in the L2 cache)"
        found.append(_verdict(text, graph and _typical(graph) <= 10, graph and f"{_typical(graph):.1f} µs"))
        if launch:
            found[-1] += f"; launched from the host with the caches flushed {_typical(launch):.1f} µs"
    else:
        text = "≥ 5× the eager chain at N = 256, C = 64, 8×8, float32"
        found.append(_verdict(text, launch and launch["speedup"] >= 5, launch and f"{launch['speedup']:.1f}×"))
        same = [r for r in rows if launch and r["microseconds"] and _case(r) == _case(launch)]
        read = next((r for r in same if r["provider"] == "plain read"), None)
        if read:
            found[-1] += f"; a sum of the map by PyTorch, {_typical(read):.1f} µs, would be {read['speedup']:.1f}×"
    share = 0.8 if gpu else 0.7
    large = [r for r in ours if r["bytes"] >= MEMORY_BOUND["gpu" if gpu else "cpu"] and "conv" not in r["op"]]
    large = [r for r in large if r["timing"] == ("graph" if gpu else "launch") and (gpu or r["op"] == "exit_head")]
    worst = min(large, key=lambda r: r["copy_share"], default=None)
    text = f"≥ {share:.0%} of copy bandwidth where maps are larger than the caches"
    reached = sum(r["copy_share"] >= share for r in large)
    seen = worst and f"{reached} of {len(large)} cases; the lowest {worst['copy_share']:.0%} at {_name(worst)}"
    found.append(_verdict(text, worst and reached == len(large), seen))
    return [*found, *_losses(rows, ours, lines)]


def _verdict(text: str, reached: Any, seen: str | None) -> str:
    return f"{'not measured' if seen is None else 'reached' if reached else 'NOT REACHED'}: {text}: {seen or '-'}"


def _losses(rows: list[Row], ours: list[Row], lines: int) -> list[str]:
    """Within the same timing, the worst first."""
    lost = []
    for row in ours:
        same = [r for r in rows if r["microseconds"] and (*_case(r), r["timing"]) == (*_case(row), row["timing"])]
        best = min((r for r in same if r["provider"] not in PLAIN), key=_typical)
        if best["provider"] != OURS:
            where = ", in graph" if row["timing"] == "graph" else ""
            ratio = _typical(row) / _typical(best)
            lost.append((ratio, f"  {_name(row)}{where}: {ratio:.2f}× the time of {best['provider']}"))
    found = [f"eefast is slower than another way in {len(lost)} of {len(ours)} measurements{':' if lost else ''}"]
    found += [text for _, text in sorted(lost, reverse=True)[:lines]]
    return [*found, f"  … and in {len(lost) - lines} more"] if len(lost) > lines else found


def _case(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CASE)


def _name(row: Row) -> str:
    """The shape, and what differs from the usual."""
    shape = f"{row['op']} {row['samples']}×{row['channels']}×{row['height']}×{row['width']}"
    unusual = [row["dtype"]]
    unusual += [f"K={row['classes']}"] if row["classes"] != 10 and row["op"] != "compact" else []
    unusual += [row["layout"]] if row["layout"] != "channels_last" else []
    unusual += [row["criterion"]] if row["criterion"] != "learned" else []
    unusual += [f"exit rate {row['exit_rate']}"] if row["exit_rate"] != 0.5 else []
    return " ".join([shape, *unusual])


def _typical(row: Row) -> float:
    return row["typical"]


def _number(row: Row | None, name: str, form: str) -> str:
    return "" if row is None or row[name] is None else form.format(row[name])


def _aligned(table: list[tuple[str, ...]]) -> list[str]:
    """Numbers to the right, words to the left."""
    columns = []
    for column in zip(*table, strict=True):
        numbers = any(cell[:1].isdigit() for cell in column[1:])
        width = max(map(len, column))
        columns.append([cell.rjust(width) if numbers else cell.ljust(width) for cell in column])
    return ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="rows; default: bench/results/*.jsonl")
    parser.add_argument("--since", default="", metavar="DATE", help="only rows of this ISO date (UTC) or later")
    parser.add_argument("--lines", type=int, default=60, help="at most so many lines per device; default 60")
    arguments = parser.parse_args()
    rows = read(arguments.files or sorted(RESULTS.glob("*.jsonl")), arguments.since)
    print(show(rows, arguments.lines) if rows else "no rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
