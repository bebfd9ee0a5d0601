"""The newest rows of trained networks → bench/results/training.md and a figure of accuracy against cost for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rows import RESULTS, SEED, Record, named, read, seed_of, slug, trained_name
from selection import OURS, OWN_THRESHOLDS, newest, speed
from training_goals import Point, goal_table, plain_points, plain_table

from eefast.measure import figures as plot
from eefast.measure.tables import line, markdown

Key = tuple[str, str, str, int]

PAGE = "training.md"
RESTRICTED = (", avx2", ", direct")
INTRODUCTION = """# Trained networks beside their plain twins

Made by `make training` (on a GPU: `bench/gpu.sh train`), which trains, measures and appends the rows; `make report`
writes this page from them. Nothing here is typed by hand.

*Twin*: the same layers, trained alike for the final exit alone. *Cost*: multiply-accumulates on the way to the exit
taken ÷ those of the plain network, mean over the test images. Thresholds were chosen on training images that were held
out of training, and all figures below are of all test images. These chose no threshold; but that EENet-32 is trained on
MNIST, and with which loss and heads on Fashion-MNIST, was settled after earlier choices had fallen short on them too.
"""


def write(files: Sequence[Path], folder: Path = RESULTS) -> list[Path]:
    """Write page and figures from the rows in `files`; nothing where they hold no trained network."""
    text = page(files)
    if not text:
        return []
    (folder / PAGE).write_text(text)
    rows = read(files)
    groups = _groups(rows)
    for key, group in groups.items():
        _draw(group, plain_points(rows, proposed(group)), folder / _figure(key))
    return [folder / PAGE, *(folder / _figure(key) for key in groups)]


def page(files: Sequence[Path]) -> str:
    """The page's text, Markdown; empty where no network was trained."""
    rows = read(files)
    groups = _groups(rows)
    lines = [INTRODUCTION, *_overview(groups), ""]
    for key, group in groups.items():
        lines += _section(key, group, plain_points(rows, proposed(group)))
        since = min(row["environment"]["date"] for row in group)
        lines += _speeds(key, [row for row in rows if "network" in row], since)
    return "\n".join(lines) if groups else ""


def _groups(rows: Sequence[Record]) -> dict[Key, list[Record]]:
    """(device, data set, network, seed) → a row per criterion, the newest."""
    trained = [
        {**row, "device": row["environment"]["device"], "seed": seed_of(row)} for row in rows if "training" in row
    ]
    groups: dict[Key, list[Record]] = {}
    for row in newest(trained, ("device", "training", "model", "seed", "criterion")):
        groups.setdefault((row["device"], row["training"], row["model"], row["seed"]), []).append(row)
    return groups


def _figure(key: Key) -> str:
    device, dataset, model, seed = key
    seeded = f"{dataset} {model}" + f" seed {seed}" * (seed != SEED)
    return f"training-{slug(f'{seeded} {device}')}.png"


def proposed(rows: Sequence[Record]) -> Record:
    """The criterion with the most accurate held-out answers within the allowed cost; of all, where none keeps it."""
    return max(rows, key=lambda row: row["at_cost"]["held_out_accuracy"] if row["at_cost"] else -1.0)


def reached(row: Record) -> bool:
    """Whether accuracy and cost on the test images are within what is allowed."""
    point = row["at_cost"]
    lost = row["twin_accuracy"] - point["accuracy"] if point else 1.0
    return bool(lost <= row["allowed_drop"] + 1e-9 and point["cost"] <= row["allowed_cost"] + 1e-9)


def _overview(groups: dict[Key, list[Record]]) -> list[str]:
    lines = _head("network", "twin", "early exits", "lost", "mean cost", "to be reached", "")
    for group in groups.values():
        row = proposed(group)
        point, goal = row["at_cost"], f"lost ≤ {100 * row['allowed_drop']:.1f} at cost ≤ {row['allowed_cost']:.2f}"
        cells = [_percent(point["accuracy"]), _lost(row, point), f"{point['cost']:.3f}"] if point else ["–"] * 3
        verdict = "reached" if reached(row) else "**not reached**"
        lines.append(_row(trained_name(row), _percent(row["twin_accuracy"]), *cells, goal, verdict))
    return [
        *lines,
        "",
        "Accuracy in percent, lost in points. The criterion is the one with the most accurate held-out answers within "
        "the allowed cost less a twentieth.",
        "",
        *goal_table([proposed(group) for group in groups.values()]),
    ]


def _section(key: Key, group: list[Record], smaller: dict[str, Point]) -> list[str]:
    row, around = proposed(group), group[-1]["environment"]
    best = row["criterion"]
    options = ", ".join(f"{name} {value}" for name, value in row["options"].items() if name not in ("dataset", "net"))
    minutes = ", ".join(f"{seconds / 60:.0f}" for seconds in row["seconds"])
    begun = f"; after {row['first']['epochs']} epochs of the plain network alone" if row["first"] else ""
    who = "plain network, network, twin" if row["first"] else "network, twin"
    lines = [f"## {trained_name(row)}", "", f"![Accuracy against cost]({_figure(key)})", ""]
    lines += _head("all images exit at", *(str(i) for i in range(len(row["exit_accuracy"]))), "twin")
    lines.append(_row("cost", *(f"{cost:.3f}" for cost in row["exit_costs"]), "1.000"))
    lines.append(_row("accuracy, %", *map(_percent, row["exit_accuracy"]), _percent(row["twin_accuracy"])))
    lines += ["", *_head("criterion", "thresholds chosen for", "held-out", "cost", "test", "lost", "cost", "exits")]
    for each in group:
        name = f"**{each['criterion']}**" if each["criterion"] == best else each["criterion"]
        for aim, point in (("accuracy", each["at_accuracy"]), ("cost", each["at_cost"])):
            if point is None:
                lines.append(_row(name, aim, *["–"] * 6))
                continue
            held_out, test = ((point[f"{p}accuracy"], point[f"{p}cost"]) for p in ("held_out_", ""))
            cells = [_percent(held_out[0]), f"{held_out[1]:.3f}", _percent(test[0]), _lost(each, point)]
            lines.append(_row(name, aim, *cells, f"{test[1]:.3f}", " ".join(map(str, point["exits"]))))
    notes = list(dict.fromkeys(f"{each['criterion']}: {each['note']}" for each in group if each["note"]))
    return [
        *lines,
        "",
        *(f"- {note}" for note in notes),
        *([""] if notes else []),
        *plain_table(row, smaller),
        f"Trained with {options}{begun}; {minutes} minutes ({who}); torch {around['torch']}, commit "
        f"{around['commit']}, {around['date'][:10]}.",
        "",
    ]


def _speeds(key: Key, rows: Sequence[Record], since: str) -> list[str]:
    """The fastest way without exits and eefast, per batch size; since: date, before which it was another network."""
    device, dataset, model, seed = key
    timed = [r for r in rows if r["network"] == named(model, dataset, seed) and r["environment"]["device"] == device]
    here = [r for r in timed if r["environment"]["date"] >= since]
    last = newest(here, ("batch_size", "provider", "setting"))
    lines = _head("batch", "fastest without exits", "images/s", "fastest of eefast", "images/s", "speed-up", "realised")
    for batch_size in dict.fromkeys(row["batch_size"] for row in last):
        ways = [row for row in last if row["batch_size"] == batch_size and row["images_per_s"]]
        # Restricted engines are for comparison only; where nothing is restricted it is the same way, measured twice.
        free = [w for w in ways if not w["provider"].endswith(RESTRICTED)]
        ours = [w for w in free if w["provider"].startswith(OURS) and w["setting"] == OWN_THRESHOLDS]
        best = next((w for w in ways if ours and w["provider"] == ours[0]["best_static"]), None)
        if best is None:
            lines.append(_row(str(batch_size), *["not measured"], *[""] * 5))
            continue
        fast = max(ours, key=speed)
        speeds = [speed(way) for way in (best, fast)]
        lines.append(
            _row(
                str(batch_size), best["provider"], f"{speeds[0]:,.0f}", fast["provider"], f"{speeds[1]:,.0f}",
                f"{speeds[1] / speeds[0]:.2f}", f"{fast['realised_ratio']:.2f}",
            )
        )  # fmt: skip
    ending = "On test images, in turns; the proposed criterion at its thresholds for cost."
    return [*lines, "", ending, ""] if last else ["No speed was measured.", ""]


def _draw(group: list[Record], smaller: dict[str, Point], path: Path) -> None:
    from matplotlib import pyplot

    row = proposed(group)
    curves = {each["criterion"]: ([c for _, c in each["curve"]], [a for a, _ in each["curve"]]) for each in group}
    points = {"twin, trained alone": (1.0, row["twin_accuracy"]), **smaller}
    if row["at_cost"]:
        points[f"chosen ({row['criterion']})"] = (row["at_cost"]["cost"], row["at_cost"]["accuracy"])
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    plot.accuracy_against_cost(axes, curves, points)
    least = 100 * (row["twin_accuracy"] - row["allowed_drop"])
    axes.plot(
        [0, row["allowed_cost"], row["allowed_cost"]],
        [least, least, 100.5],
        ":",
        color="gray",
        linewidth=1,
        label="to be reached",
    )
    axes.legend(loc="best", fontsize=8)
    axes.set(title=f"{trained_name(row)}, {row['test_images']:,} test images", xlim=(0, 1.03))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _row(*cells: str) -> str:
    return line(cells)


def _head(*cells: str) -> list[str]:
    return markdown(cells, ())


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _lost(row: Record, point: Record) -> str:
    return f"{100 * (row['twin_accuracy'] - point['accuracy']):.2f}"
