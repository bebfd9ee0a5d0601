"""Folders of trained networks → what each recipe gives on held-out training images, as rows, and recipes.md from these.

No test image is read: recipes are chosen by these figures. Folders without records of `eefast train` are refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from command import run_command
from data_sets import name_of
from int8_accuracy import Images, held_out_of
from progress import track
from rows import RESULTS, RecipeRow, Record, append, environment, read
from selection import newest

import eefast
from eefast.measure.tables import markdown
from eefast.thresholds.candidates import make_candidate
from eefast.thresholds.comparing import BASE, accuracies_at, path_of
from eefast.thresholds.outputs import some
from eefast.train.folder import REPORT_FILE
from eefast.train.options import TrainOptions

PAGE = "recipes.md"
ROOT = Path(__file__).parents[1]
COSTS = (0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)
SPLITS = 10
# Told by the network, or no part of the recipe.
OTHER_OPTIONS = ("dataset", "net", "download", "device", "workers", "tensorboard", "resume", "test", "image_size")
INTRODUCTION = """# Recipes tried, by held-out training images

Made by `bench/recipes.py FOLDERS`; `make report` writes this page from its rows. No test image was read for it.

*Alone*: all images exit at one exit. *At a mean cost*: by the largest probability; one half of the held-out images
chooses the thresholds, the other judges, mean over ten divisions. A twin has loss `final_supervision`: of its exits,
only the last one has learned.
"""


def measured(folder: Path, net: eefast.EarlyExitNet, images: Images) -> RecipeRow:
    """The row of a network on its held-out images."""
    assert net.record is not None
    outputs = images.outputs(net, folder.name)
    halves = [
        torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(i)).tensor_split(2)
        for i in range(SPLITS)
    ]
    found = []
    for choose, judge in halves:
        chosen, labels = some(outputs, choose), images.labels[choose]
        candidate = make_candidate(BASE, chosen, labels)
        points = path_of(candidate, chosen, labels, net.cost)
        found.append(accuracies_at(candidate, points, some(outputs, judge), images.labels[judge], net.cost, COSTS))
    report = json.loads((folder / REPORT_FILE).read_text())
    return RecipeRow(
        recipe=folder.name,
        model=net.record.network,
        trained_on=name_of(net.record),
        options=_told(report["arguments"]),
        seconds=sum(report["seconds_per_epoch"]),
        images=len(images.labels),
        exit_costs=tuple(net.cost.tolist()),
        exit_accuracy=tuple(float((o.logits.argmax(1) == images.labels).double().mean()) for o in outputs),
        costs=COSTS,
        accuracy=tuple(torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist()),
    )


def _told(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options that differ from the defaults of `eefast train`."""
    usual = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(TrainOptions()).items()}
    return {
        name: value
        for name, value in arguments.items()
        if name not in OTHER_OPTIONS and value is not None and value != usual.get(name)
    }


def page(rows: Sequence[Record]) -> str:
    """The page's text, Markdown; empty without rows of recipes."""
    recipes = newest((row for row in rows if "recipe" in row), ("trained_on", "model", "recipe"))
    lines = []
    for dataset, network in dict.fromkeys((row["trained_on"], row["model"]) for row in recipes):
        group = [row for row in recipes if (row["trained_on"], row["model"]) == (dataset, network)]
        lines += [f"## {network} on {dataset}", "", *_table(group), ""]
        lines += [f"- **{row['recipe']}**: {_sentence(row)}" for row in group]
        lines.append("")
    return "\n".join([INTRODUCTION, *lines]) if lines else ""


def _table(rows: Sequence[Record]) -> list[str]:
    costs = rows[0]["costs"]
    titles = ["recipe", *(f"at cost {cost:.2f}" for cost in costs), "last exit", "early exits alone"]
    return markdown(
        titles,
        [
            [
                row["recipe"],
                *(f"{100 * accuracy:.2f}" for accuracy in row["accuracy"]),
                f"{100 * row['exit_accuracy'][-1]:.2f}",
                " ".join(f"{100 * a:.1f}" for a in row["exit_accuracy"][:-1]),
            ]
            for row in rows
        ],
    )


def _sentence(row: Record) -> str:
    options = ", ".join(f"{name} {value}" for name, value in row["options"].items())
    costs = " ".join(f"{cost:.3f}" for cost in row["exit_costs"])
    minutes = row["seconds"] / 60
    return f"{options}; exits at costs {costs}; {row['images']:,} held-out images; {minutes:.0f} minutes."


def write(rows: Sequence[Record], folder: Path = RESULTS) -> list[Path]:
    """Write the page; nothing where there is no recipe."""
    text = page(rows)
    if text:
        (folder / PAGE).write_text(text)
    return [folder / PAGE] if text else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", type=Path, help="folders of `eefast train`")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", help="folder with mnist/ and such; data")
    arguments = parser.parse_args()
    around = environment("cpu")
    for folder in track(arguments.networks, "recipes"):
        net = eefast.load(folder).eval()
        append([measured(folder, net, held_out_of(net, folder, arguments.data_root))], around)
    for path in write(read(sorted(RESULTS.glob("*.jsonl")))):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    run_command(main)
