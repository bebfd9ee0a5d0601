"""Committed rows → docs/benchmarks.md and its figures: what was measured, where, by which command; losses included."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import page_figures as figures
import page_tables
import parity_table
import recipes
import training_page
from page_figures import Mark
from rows import RESULTS, Record, read, slug, trained_name
from selection import (
    AUTO,
    COMPACT,
    OURS,
    OWN_THRESHOLDS,
    RESIDENT,
    RESIDENT_INT8,
    STATIC,
    Cases,
    beside,
    cases_of,
    in_int8,
    in_one_thread,
    measured_networks,
    newest,
    newest_int8,
    newest_latency,
    newest_networks,
    on_backbone,
    op_case,
    speed,
)
from subjects import MNIST
from targets import int8_checks, network_losses
from training_page import proposed

from eefast.measure.tables import markdown

DOCS = Path(__file__).parent.parent / "docs"
PAGE, FIGURES = DOCS / "benchmarks.md", DOCS / "benchmarks"
SAME_COST = 0.05
"""Difference of the mean costs, on the images that are timed and on all test images, of the same network."""

# What `eefast demo --json` wrote.
DEMO = RESULTS / "demo.json"

INTRODUCTION = """# Benchmarks

Made by `make report` from the rows in [bench/results](../bench/results); nothing here is typed by hand. Every way's
answers were checked before it was timed. The ways of a case that a session measures run in turns; where some were
measured again later, the newest counts, and their commits say so. Speeds are medians.

*Realised ratio* = mean cost × time of the best way without exits ÷ time. 1.0: all that theory promises over the best
engine that a user could pick shows on the clock. Where no image leaves early it is the plain speed-up over that engine.
A cost in a heading is the one asked for, or what the same mix of exits costs in the largest batch measured.

*Memory kept*: with `MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184` in the environment glibc keeps what is
freed. By default PyTorch's large maps go back to the system after a layer and are faulted in again by a later one.
"""

Draw = Callable[[Any], object]


@dataclass(frozen=True)
class Section:
    """A part of the page.

    lines: Markdown; figures: file name → what draws it on a new matplotlib Figure.
    """

    lines: Sequence[str]
    figures: dict[str, Draw] = field(default_factory=dict)


def page(files: Iterable[Path], demo: Path | None = None) -> str:
    """The whole page, Markdown; demo: what `eefast demo --json` wrote."""
    return "\n".join([INTRODUCTION, *(line for section in _sections(files, demo) for line in section.lines)])


def draw(files: Iterable[Path], folder: Path, demo: Path | None = None) -> list[Path]:
    """The page's figures, written to `folder`."""
    from matplotlib.figure import Figure
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for section in _sections(files, demo):
        for name, draws in section.figures.items():
            figure = Figure(layout="constrained")
            draws(figure)
            made.append(folder / name)
            pixels = BytesIO()
            figure.savefig(pixels, dpi=110)
            # A palette takes a third of the bytes.
            Image.open(pixels).convert("RGB").quantize(128).save(made[-1], optimize=True)
    return made


def _sections(files: Iterable[Path], demo: Path | None) -> list[Section]:
    found = machines(files)
    return [*(s for rows in found for s in _machine(rows)), *_accuracy(found, demo)]


def _image(alt: str, name: str) -> list[str]:
    return [f"![{alt}]({FIGURES.name}/{name})", ""]


def machines(files: Iterable[Path]) -> list[list[Record]]:
    """Rows by device, CPU capability and whether one thread works, since these decide how fast everything is."""
    machines: dict[tuple[str, str, bool], list[Record]] = {}
    for row in read(files, ""):
        around = row["environment"]
        key = around["device"], "" if around["cuda"] else around["capability"], in_one_thread(row)
        machines.setdefault(key, []).append(row)
    return list(machines.values())


def _machine(rows: list[Record]) -> list[Section]:
    gpu = rows[-1]["environment"]["cuda"] is not None
    title, stem = [f"## {_name(rows)}", ""], _stem(rows)
    backbones, rows = ([row for row in rows if on_backbone(row) == wanted] for wanted in (True, False))
    cases = cases_of(measured_networks(rows))
    float_, int8 = (in_int8(cases, wanted) for wanted in (False, True))
    sections = [
        *(_realised(float_, stem), _speed_ups(float_, stem), _tables(rows, gpu), _in_time(rows), _losses(cases, gpu)),
        _backbones(backbones),
        *(_precisions(rows), _realised(int8, f"{stem}-int8"), _speed_ups(int8, f"{stem}-int8"), _int8(rows)),
        *(_latency(rows, stem), _ops(rows, stem, gpu), _parity(rows)),
    ]
    found = [section for section in sections if section is not None]
    return [Section(title), *found] if found else []


def _name(rows: list[Record]) -> str:
    around = rows[-1]["environment"]
    threads = "1 thread" if in_one_thread(rows[-1]) else f"{around['threads']} threads"
    words = (f"{around['device']}", f"{around['capability']}", threads)
    return words[0] if around["cuda"] else ", ".join(words)


def _realised(cases: Cases, stem: str) -> Section | None:
    """The best of eefast and of all others, where no image exits early and where most do."""
    shown = sorted(key for key, ways in cases.items() if any(name.startswith(OURS) for name in ways))
    if not shown:
        return None

    def draws(figure: Any) -> None:
        figure.set_size_inches(10, 1.2 + 0.42 * len(shown))
        figures.realised_ratios(figure.subplots(), cases, shown)

    return Section(_image("Realised ratios", f"{stem}.png"), {f"{stem}.png": draws})


def speed_ups(cases: Cases) -> dict[str, dict[tuple[int, str], float]]:
    """Network → (batch size, setting) → images/s of eefast's fastest way ÷ those of the fastest without exits.

    The setting of lowest cost comes first.
    """
    found: dict[str, dict[tuple[int, str], float]] = {}
    costs: dict[tuple[str, str], float] = {}
    for (network, batch_size, setting), ways in cases.items():
        same = beside(cases, network, batch_size, setting)
        static = [row for name, row in same.items() if name.startswith(STATIC)]
        # In another dtype it would be another comparison.
        dtypes = {row["dtype"] for row in static}
        eefast_rows = [row for name, row in ways.items() if name.startswith(OURS) and row["dtype"] in dtypes]
        if eefast_rows and static:
            best, rival = (max(rows, key=speed) for rows in (eefast_rows, static))
            found.setdefault(network, {})[batch_size, setting] = speed(best) / speed(rival)
            costs[network, setting] = min(best["mean_cost"], costs.get((network, setting), 1.0))
    return {n: dict(sorted(cells.items(), key=lambda cell: costs[n, cell[0][1]])) for n, cells in found.items()}


def _speed_ups(cases: Cases, stem: str) -> Section | None:
    found = speed_ups(cases)
    if not found:
        return None
    cells = [(value, f"{name}, batch {n}, {s}") for name, ratios in found.items() for (n, s), value in ratios.items()]
    bound = max(figures.CELL_BOUND, *(max(value, 1 / value) for value, _ in cells))
    sizes = sorted({n for ratios in found.values() for n, _ in ratios})
    widths = [0.5 + len({setting for _, setting in ratios}) for ratios in found.values()]

    def draws(figure: Any) -> None:
        figure.set_size_inches(1.5 + 1.05 * sum(widths), 3.6)
        panels = figure.subplots(1, len(found), squeeze=False, sharey=True, gridspec_kw={"width_ratios": widths})[0]
        for axes, (network, ratios) in zip(panels, found.items(), strict=True):
            figures.speed_ups(axes, ratios, sizes, bound).set_title(network, fontsize=10)
        panels[0].set_ylabel("batch size")

    lost = sorted(cell for cell in cells if cell[0] < 1)
    text = f"eefast is slower in {len(lost)} of {len(cells)} cells"
    text += f"; the lowest is {lost[0][0]:.2f} at {lost[0][1]}." if lost else "."
    return Section(
        [
            *_image("Speed-up over batch size and cost", f"{stem}-speed-up.png"),
            "Images/s of eefast's fastest way ÷ those of the fastest way without exits in the same dtype, over batch "
            f"size and cost. Blue: faster, red: slower, blank: not measured. {text}",
            "",
        ],
        {f"{stem}-speed-up.png": draws},
    )


def _tables(rows: list[Record], gpu: bool) -> Section | None:
    measured, found = measured_networks(rows), []
    for network, table in page_tables.network_tables(rows, partial(markdown, left=None)).items():
        own = [r for r in measured if r["network"] == network]
        trained = any(r["setting"] == OWN_THRESHOLDS for r in own) and network != MNIST
        command = "make training" if trained else "make gpu" if gpu else "make bench"
        dtypes, torch = sorted({r["dtype"] for r in own}), ", ".join(sorted({r["environment"]["torch"] for r in own}))
        found += [
            *(f"### {network}", "", *table, ""),
            f"Images/s, in brackets the realised ratio, of plain ways × the best of them; {', '.join(dtypes)}; "
            f"torch {torch}; `{command}`; commits {_commits(own)}.",
            "",
        ]
    return Section(found) if found else None


def _commits(rows: Iterable[Record]) -> str:
    made = {(r["environment"]["commit"], r["environment"]["date"][:10]) for r in rows}
    return ", ".join(f"{commit} ({date})" for commit, date in sorted(made, key=lambda one: (one[1], one[0])))


def _losses(cases: Cases, gpu: bool) -> Section | None:
    if not cases:
        return None
    found = [
        line
        for engine in ((COMPACT,) if gpu else (RESIDENT, RESIDENT_INT8, COMPACT))
        if any(engine in ways for ways in cases.values())
        for line in network_losses(cases, engine, len(cases))
    ]
    return Section(["Where eefast loses:", "", *(f"- {line.strip()}" for line in found), ""])


def _backbones(rows: list[Record]) -> Section | None:
    table = page_tables.backbone_table(rows, partial(markdown, left=4))
    if not rows:
        return None
    cases, clock = cases_of(measured_networks(rows)), " of the process" * in_one_thread(rows[-1])
    notes = dict.fromkeys(f"- {r['network']}, {r['provider']}: {r['note']}" for r in newest_networks(rows) if r["note"])
    return Section(
        [
            *("### Networks of torchvision and timm", "", *table, "", *notes, *([""] if notes else [])),
            *(f"- {line.strip()}" for line in network_losses(cases, AUTO, len(cases))),
            "",
            f"Realised ratio and images/s, by the time{clock}, 224×224, random weights, with exits attached by "
            '`eefast.attach`. *eefast call*: `engine="auto"`; per stage: the runtime runs them, and images that exit '
            "are left out of the next one. Planning: until the first answer, in the first case of a network. "
            f"`make backbones`; commits {_commits(measured_networks(rows))}.",
            "",
        ]
    )


def _in_time(rows: list[Record]) -> Section | None:
    table = page_tables.time_table(rows, partial(markdown, left=4))
    if not table:
        return None
    return Section(
        [
            *("### Costs in MACs and in time", "", *table, ""),
            "Mean cost of the exits taken: in MACs, and in the time that the stages up to them take of the plain "
            "network's. The realised ratio is (cost in MACs ÷ cost in time) × the last column, what the loop and its "
            "kernels make of the time that they could save. eefast's fastest way of each case.",
            "",
        ]
    )


def _precisions(rows: list[Record]) -> Section | None:
    table = page_tables.precision_table(rows, partial(markdown, left=None))
    if not table:
        return None
    return Section(
        [
            *("### Float and int8", "", *table, ""),
            "Images/s of eefast's resident engine in both precisions; *a ÷ b*: its realised ratio in precision a over "
            "the best way without exits in precision b. *Other answers*: images whose class in int8 is not that in "
            "float32; the networks have random weights, what trained ones lose is below. `make int8`.",
            "",
        ]
    )


def _int8(rows: list[Record]) -> Section | None:
    table = page_tables.int8_table(rows, partial(markdown, left=3))
    if not table:
        return None
    return Section(
        [
            *("### Accuracy in int8", "", *table, ""),
            *(f"- {line}" for line in int8_checks(newest_int8(rows))),
            "",
            "Test images; ranges of maps and recalibrated thresholds are from held-out training images, at the mean "
            "cost that the float32 network has there. `make int8-accuracy`.",
            "",
        ]
    )


def _latency(rows: list[Record], stem: str) -> Section | None:
    last = newest_latency(rows)
    if not last:
        return None
    served: dict[str, list[Record]] = {}
    for row in last:
        if row["milliseconds"] and row["offered"]:
            served.setdefault(f"{row['model']}, {row['setting']}, up to {row['most']} together", []).append(row)

    def draws(figure: Any) -> None:
        figure.set_size_inches(10, 0.6 + 4 * ((len(served) + 1) // 2))
        panels = list(figure.subplots((len(served) + 1) // 2, 2, squeeze=False).flat)
        labels: dict[str, Any] = {}
        for axes, (title, rows_shown) in zip(panels, served.items(), strict=False):
            lines, names = figures.latencies(axes, rows_shown).get_legend_handles_labels()
            labels |= dict(zip(names, lines, strict=True))
            axes.set_title(title, fontsize=10)
        for axes in panels[len(served) :]:
            axes.remove()
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, fontsize=8)

    name, around = f"{stem}-latency.png", last[-1]["environment"]
    notes = dict.fromkeys(f"- {r['model']}, {r['scenario']}, {r['provider']}: {r['note']}" for r in last if r["note"])
    return Section(
        [
            *("### Latency", "", *(_image("Latency against load", name) if served else [])),
            *page_tables.latency_table(rows, partial(markdown, left=3)),
            "",
            *(f"- {line}" for line in _waits(last)),
            *(*notes, ""),
            "From an image's arrival to its answer. Offline: all images are there. Server: single images arrive at "
            "random (Poisson); what has arrived when the last batch is answered is answered together. SingleStream: "
            "the next image comes when the last is answered. Load: images/s that arrive ÷ those of the plain network "
            "offline. "
            f"`make latency`; commit {around['commit']} ({around['date'][:10]}).",
            "",
        ],
        {name: draws} if served else {},
    )


def _waits(rows: list[Record]) -> list[str]:
    """Where an image waits longer for eefast than for another way: by the 99 % quantile, of the same arrivals."""
    cases: dict[tuple[Any, ...], list[Record]] = {}
    for row in rows:
        if row["milliseconds"]:
            cases.setdefault((row["model"], row["setting"], row["scenario"], row["offered"]), []).append(row)
    lost, count = [], 0
    for (model, setting, scenario, offered), ways in cases.items():
        eefast_rows, others = ([w for w in ways if w["provider"].startswith(OURS) == ours] for ours in (True, False))
        if not eefast_rows or not others:
            continue
        count += 1
        ours, best = (min(part, key=lambda row: row["milliseconds"][2]) for part in (eefast_rows, others))
        if best["milliseconds"][2] < ours["milliseconds"][2]:
            where = f"{model}, {setting}, {scenario}" + (f" at {offered:,.0f}/s" if offered else "")
            times = ours["milliseconds"][2] / best["milliseconds"][2]
            lost.append(f"{where}: p99 is {times:.2f}× that of {best['provider']}")
    return [f"eefast's p99 is longer than another way's in {len(lost)} of {count} cases{':' if lost else ''}", *lost]


def _ops(rows: list[Record], stem: str, gpu: bool) -> Section | None:
    """The exit ops against eager PyTorch, as far as they were measured on this machine."""
    table = page_tables.op_table(rows, partial(markdown, left=None))
    if not table:
        return Section(["The exit ops were not measured here.", ""]) if any("network" in row for row in rows) else None
    found = ["### Exit ops", ""]
    marks, ceilings, idle = roofline(rows)
    name = f"{stem}-roofline.png"
    if marks:
        around = marks[-1]["environment"]
        found += [
            *_image("Roofline of the exit ops", name),
            "A mark per case of the last run of most cases below; the roofs are what a copy of a large tensor and a "
            "large matrix product of PyTorch reached in the same run, which maps in a cache and better kernels may "
            "exceed"
            f"{'; in a CUDA graph where there is one' if gpu else ''}. "
            + (f"Left out, since it computes nothing: {', '.join(idle)}. " if idle else "")
            + f"Commit {around['commit']} ({around['date'][:10]}).",
            "",
        ]

    def draws(figure: Any) -> None:
        figure.set_size_inches(7, 4.5)
        figures.roofline(figure.subplots(), marks, ceilings)

    found += table
    above = "A share above 100 %: the maps came from a cache, or PyTorch's matrix product, the bound, was slower."
    note = "" if gpu else above
    return Section([*found, "", *([note, ""] if note else [])], {name: draws} if marks else {})


def roofline(rows: list[Record]) -> tuple[list[Record], list[Record], list[str]]:
    """Ops of the last run of most cases, its ceilings, and the names of the ops that compute nothing."""
    runs: dict[str, list[Record]] = {}
    for row in rows:
        if "ceiling" in row or ("op" in row and row["provider"] == OURS and row["typical"]):
            runs.setdefault(row["environment"]["date"], []).append(row)
    found: tuple[list[Record], list[Record], list[str]] = [], [], []
    for run in reversed(runs.values()):
        ceilings = [row for row in run if "ceiling" in row]
        # A graph shows the kernel without the host that launches it.
        ops = {op_case(r): r for r in sorted((r for r in run if "op" in r), key=lambda r: r["timing"] == "graph")}
        marks = [row for row in ops.values() if row["flops"]]
        if len(marks) > len(found[0]) and {"copy", "matmul"} <= {row["ceiling"] for row in ceilings}:
            found = marks, ceilings, sorted({row["op"] for row in ops.values() if not row["flops"]})
    return found


def _parity(rows: list[Record]) -> Section | None:
    text = parity_table.table(rows)
    return Section(["### Parity", "", text, ""]) if text else None


def _stem(rows: list[Record]) -> str:
    around = rows[-1]["environment"]
    name = around["device"] if around["cuda"] else f"{around['device']} {around['capability']}"
    return slug(name + " 1 thread" * in_one_thread(rows[-1]))


def _accuracy(machines: list[list[Record]], demo: Path | None) -> list[Section]:
    """Networks whose accuracy was measured, too: the demonstration's, and those that were trained here."""
    trainings = sorted(
        (r for rows in machines for r in rows if "training" in r), key=lambda r: r["environment"]["date"]
    )
    found = [*([_of_demo(demo)] if demo else []), *(s for rows in machines for s in _of_trained(rows, trainings))]
    return [Section(["## Accuracy against images/s", ""]), *found] if found else []


def _of_demo(demo: Path) -> Section:
    found = json.loads(demo.read_text())
    # The one-by-one loop answers too few images for an accuracy to be compared.
    most = max(r["images"] for r in found["rows"])
    rows = [r for r in found["rows"] if r["images"] == most]
    points = [Mark(r["name"], r["criterion"] is None, r["accuracy"], r["images_per_s"], r["mean_cost"]) for r in rows]
    around = found["environment"]
    title = f"{found['network']}, MNIST, {around['processor']}, {around['capability']}, {around['threads']} threads"
    batch = f"batch {', '.join(map(str, dict.fromkeys(r['batch_size'] for r in rows)))}"
    origin = f"All {most:,} test images, {batch}; `eefast demo --json`; commit {around['commit']}."
    return _trade_off(title, points, origin, "accuracy-demo.png")


def _of_trained(rows: list[Record], trainings: list[Record]) -> Iterable[Section]:
    """The trained networks' own thresholds and their plain twins, in the largest batch that was timed.

    trainings: of all machines, since what a network answers hardly depends on where that was found out.
    """
    trained: dict[str, list[Record]] = {}
    for row in newest((r | {"name": trained_name(r)} for r in trainings), ("name", "criterion")):
        trained.setdefault(row["name"], []).append(row)
    cases = cases_of(measured_networks(rows))
    for network, group in trained.items():
        best = proposed(group)
        sizes = [n for name, n, setting in cases if name == network and setting == OWN_THRESHOLDS]
        if not sizes or best["at_cost"] is None:
            continue
        same = beside(cases, network, max(sizes), OWN_THRESHOLDS)
        same = {name: row for name, row in same.items() if name.startswith(STATIC) or _is_timed(row, best)}
        if all(name.startswith(STATIC) for name in same):
            continue
        # In fewer bits than the ways without exits take, images near a threshold exit elsewhere.
        dtypes = {row["dtype"] for name, row in same.items() if name.startswith(STATIC)}
        accuracy = {True: best["twin_accuracy"], False: best["at_cost"]["accuracy"]}
        points = [
            Mark(name, static := name.startswith(STATIC), accuracy[static], speed(row), row["mean_cost"])
            for name, row in same.items()
            if row["dtype"] in dtypes
        ]
        origin = (
            f"Batch {max(sizes)}. Accuracy of the float32 network, and without exits of its plain twin, on all "
            f"{best['test_images']:,} test images; commit {best['environment']['commit']} "
            f"({best['environment']['date'][:10]}). More: [training](../bench/results/training.md)."
        )
        name = f"{_stem(rows)}-accuracy-{slug(network)}.png"
        yield _trade_off(f"{network}, {_name(rows)}", points, origin, name)


def _is_timed(row: Record, trained: Record) -> bool:
    """Whether a row of speeds is of the network of a training, not of one of the same name that was trained before."""
    cost = trained["at_cost"]["cost"]
    return len(row["mix"]) == len(trained["exit_costs"]) and abs(row["mean_cost"] - cost) < SAME_COST


def _trade_off(title: str, points: Sequence[Mark], origin: str, name: str) -> Section:
    def draws(figure: Any) -> None:
        figure.set_size_inches(9, 4)
        figures.accuracy_of_ways(figure.subplots(), points).set_title(title, fontsize=10)

    return Section(
        [
            *(f"### {title}", "", *_image("Accuracy against images/s", name)),
            *markdown(
                ("way", "accuracy", "images/s", "mean cost"),
                [(p.name, f"{p.accuracy:.2%}", f"{p.images_per_s:,.0f}", f"{p.mean_cost:.3f}") for p in points],
            ),
            *("", f"{origin} Gray: without exits, blue: eefast, orange: other ways with exits.", ""),
        ],
        {name: draws},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are what the rows give")
    arguments = parser.parse_args()
    files = sorted(RESULTS.glob("*.jsonl"))
    pages = {PAGE: page(files, DEMO), RESULTS / training_page.PAGE: training_page.page(files)}
    if tried := recipes.page(read(files)):
        pages[RESULTS / recipes.PAGE] = tried
    if arguments.check:
        return int(any((path.read_text() if path.exists() else "") != text for path, text in pages.items()))
    PAGE.write_text(pages[PAGE])
    for path in [PAGE, *draw(files, FIGURES, DEMO), *training_page.write(files), *recipes.write(read(files))]:
        print(path.relative_to(DOCS.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
