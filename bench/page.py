"""Committed rows → docs/benchmarks.md and its figures: what was measured, where, by which command; losses included."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from report import (
    COMPACT,
    HEADINGS,
    NETWORK,
    NO_EXITS,
    OURS,
    RESIDENT,
    Row,
    _by_setting,
    _newest,
    _setting_losses,
)
from rows import RESULTS, read

PLAIN = "plain"
DOCS = Path(__file__).parent.parent / "docs"
PAGE, FIGURES = DOCS / "benchmarks.md", DOCS / "benchmarks"

INTRODUCTION = """# Benchmarks

Made by `make report` from the rows in [bench/results](../bench/results); nothing here is typed by hand. Every way's
answers were checked before it was timed; all ways of a case ran in one session, in turns. Speeds are medians.

*Realised ratio* = mean cost × time of the best way without exits ÷ time. 1.0: all that theory promises over the best
engine that a user could pick shows on the clock. Where no image leaves early it is the plain speed-up over that engine.
"""


def page(files: Iterable[Path]) -> str:
    """The whole page, Markdown."""
    return "\n".join([INTRODUCTION, *(line for rows in _machines(files) for line in _machine(rows))])


def _machines(files: Iterable[Path]) -> list[list[Row]]:
    """Rows by device and CPU capability, since both decide how fast everything is."""
    machines: dict[tuple[str, str], list[Row]] = {}
    for row in read(files, ""):
        around = row["environment"]
        machines.setdefault((around["device"], "" if around["cuda"] else around["capability"]), []).append(row)
    return list(machines.values())


def _machine(rows: list[Row]) -> list[str]:
    around, gpu = rows[-1]["environment"], rows[-1]["environment"]["cuda"] is not None
    networks = _networks(rows)
    if not networks:
        return []
    name = around["device"] if gpu else f"{around['device']}, {around['capability']}, {around['threads']} threads"
    command = "make gpu" if gpu else "make bench"
    found = [f"## {name}", "", f"![Realised ratios]({FIGURES.name}/{_stem(rows)}.png)", ""]
    found += _tables(networks, command)
    found += ["Where eefast loses:", ""]
    for own in (COMPACT,) if gpu else (RESIDENT, COMPACT):
        found += [f"- {line.strip()}" for line in _setting_losses(_cases(networks), own, len(networks))]
    return [*found, "", *_ops(rows, gpu)]


def _networks(rows: list[Row]) -> list[Row]:
    """The newest row of each way, network, batch size and setting."""
    newest = _newest((r for r in rows if "network" in r), (*NETWORK, "setting", "provider"))
    measured = [r for r in newest if r["images_per_s"]]
    # The first rows of a machine were made before there were rivals beside PyTorch; they give way to later ones.
    return [r for r in measured if r.get("setting")] or measured


def _cases(rows: list[Row]) -> dict[tuple[Any, ...], dict[str, Row]]:
    """(network, batch size, setting) → way → row; where rows only name a mix of exits, its mean cost is the setting."""
    costs = {_mix(r): r["mean_cost"] for r in rows if not r.get("setting") and r["mean_cost"] not in (None, 1)}
    named = [{**r, "setting": r.get("setting") or _setting(r, costs.get(_mix(r)))} for r in rows]
    return _by_setting(named)


def _mix(row: Row) -> tuple[Any, ...]:
    return row["network"], row["batch_size"], str(row["mix"])


def _setting(row: Row, cost: float | None) -> str:
    return NO_EXITS if row["mix"][-1] == 1 else "some exits" if cost is None else f"cost {cost:.2f}"


def _tables(rows: list[Row], command: str) -> list[str]:
    found = []
    for network in dict.fromkeys(r["network"] for r in rows):
        own = {key[1:]: ways for key, ways in _cases(rows).items() if key[0] == network}
        names = list(dict.fromkeys(name for ways in own.values() for name in ways))
        found += [f"### {network}", "", "| way | " + " | ".join(f"batch {n}, {s}" for n, s in own) + " |"]
        found += ["|---|" + "---|" * len(own)]
        for name in sorted(
            names, key=lambda name: (name.startswith(OURS), list(HEADINGS).index(name) if name in HEADINGS else 99)
        ):
            cells = [_cell(ways.get(name)) for ways in own.values()]
            found.append(f"| {name} | " + " | ".join(cells) + " |")
        made = sorted(
            {(r["environment"]["commit"], r["environment"]["date"][:10]) for r in rows if r["network"] == network}
        )
        dtypes, torch = sorted({r["dtype"] for r in rows}), rows[-1]["environment"]["torch"]
        found += [
            "",
            f"Images/s, in brackets the realised ratio, of plain ways × the best of them; {', '.join(dtypes)}; "
            f"torch {torch}; `{command}`; commits {', '.join(f'{c} ({d})' for c, d in made)}.",
            "",
        ]
    return found


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    ratio = f" ({row['realised_ratio']:.2f})" if row["realised_ratio"] is not None else ""
    return f"{row['images_per_s'][1]:,.0f}{ratio}"


def _ops(rows: list[Row], gpu: bool) -> list[str]:
    """The exit ops against eager PyTorch, as far as they were measured on this machine."""
    key = ("op", "samples", "channels", "height", "width", "classes", "dtype", "layout", "criterion", "exit_rate")
    ops = _newest((r for r in rows if "op" in r and r["provider"] == OURS and r["typical"]), (*key, "timing"))
    if not ops:
        return ["The exit ops were not measured here.", ""]
    found = [
        "### Exit ops",
        "",
        "| op | maps | dtype | leave | µs | × eager | share of the bound |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in ops:
        shape = f"{r['samples']} × {r['channels']}×{r['height']}×{r['width']}, K = {r['classes']}"
        numbers = [
            f"{r['typical']:,.1f}",
            *(_or_blank(r[name], form) for name, form in (("speedup", "{:.1f}"), ("bound_share", "{:.0%}"))),
        ]
        how = f"{r['op']}{' in a graph' if r['timing'] == 'graph' else ''}"
        found.append(f"| {how} | {shape} | {r['dtype']} | {r['exit_rate']:.0%} | " + " | ".join(numbers) + " |")
    note = "A share above 100 %: the maps came from a cache, the bound is that of memory." if not gpu else ""
    return [*found, "", *([note, ""] if note else [])]


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _stem(rows: list[Row]) -> str:
    around = rows[-1]["environment"]
    words = around["device"] if around["cuda"] else f"{around['device']} {around['capability']}"
    return "".join(c if c.isalnum() else "-" for c in words.lower())


def draw(files: Iterable[Path], folder: Path) -> list[Path]:
    """One figure per machine: realised ratio of every way, where no image leaves early and where most do."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    made = []
    for rows in _machines(files):
        cases = _cases(_networks(rows))
        if not cases:
            continue
        shown = sorted(key for key, ways in cases.items() if any(name.startswith(OURS) for name in ways))
        fig, axes = pyplot.subplots(figsize=(10, 1.2 + 0.42 * len(shown)), layout="constrained")
        for p, key in enumerate(shown):
            same = {**cases.get((*key[:2], NO_EXITS), {}), **cases[key]}
            rivals = [row for name, row in same.items() if not name.startswith(OURS)]
            # Ours in another dtype than the rivals' would be another comparison.
            own = [
                r for n, r in cases[key].items() if n.startswith(OURS) and r["dtype"] in {r["dtype"] for r in rivals}
            ]
            for rows_of, color, offset in ((own, "tab:blue", -0.2), (rivals, "tab:gray", 0.2)):
                best = max(rows_of, key=lambda r: r["images_per_s"][1], default=None)
                value = _ratio(best, cases[key])
                bar = axes.barh(p + offset, value, height=0.38, color=color)
                axes.bar_label(
                    bar, [f"{value:.2f}  {best['provider'] if best else 'not measured'}"], padding=3, fontsize=8
                )
        places = range(len(shown))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(list(places), [f"{network}, batch {n}, {setting}" for network, n, setting in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(
            "realised ratio: the best of eefast (blue), the best of all others (gray); 1 = all that theory promises"
        )
        axes.margins(x=0.35)
        folder.mkdir(parents=True, exist_ok=True)
        made.append(folder / f"{_stem(rows)}.png")
        fig.savefig(made[-1], dpi=110, metadata={"Software": None})
        pyplot.close(fig)
    return made


def _ratio(row: Row | None, ways: dict[str, Row]) -> float:
    """Mean cost × time of the best way without exits ÷ time; whoever computes everything gets that cost for nothing."""
    if row is None or row["realised_ratio"] is None:
        return 0.0
    cost = next((r["mean_cost"] for name, r in ways.items() if not name.startswith(PLAIN) and r["mean_cost"]), 1.0)
    return float(row["realised_ratio"]) * (float(cost) if row["provider"].startswith(PLAIN) else 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="only say whether docs/benchmarks.md is what the rows give"
    )
    arguments = parser.parse_args()
    files = sorted(RESULTS.glob("*.jsonl"))
    text = page(files)
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.write_text(text)
    for path in [PAGE, *draw(files, FIGURES)]:
        print(path.relative_to(DOCS.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
