"""A trained network and its data → how often bounds break on new images, with an assurance and without, as rows.

The held-out and the test images, none of which the network was trained on, are divided again for every draw: into as
many as were held out, which choose thresholds, and the others, which judge. The first draw is the real division.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from command import run_command
from int8_accuracy import Images, name_of, parser_of, with_data
from progress import track
from rows import BoundRow, append, environment
from torch import Tensor

from eefast.measure.tables import aligned
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput
from eefast.thresholds.calibration import calibrate
from eefast.thresholds.outputs import outcome

ASSURANCES = (None, 0.9)
BOUNDS = ({"max_accuracy_drop": 0.005}, {"max_accuracy_drop": 0.01}, {"max_cost": 0.1})


@dataclass(frozen=True)
class Outputs:
    """Of all exits, the labels [N] and the exits' costs [n + 1]."""

    exits: Sequence[ExitOutput]
    labels: Tensor
    cost: Tensor

    def some(self, images: Tensor) -> Outputs:
        return Outputs([ExitOutput(*(p[images] for p in out)) for out in self.exits], self.labels[images], self.cost)

    def final_accuracy(self) -> float:
        return float((self.exits[-1].logits.argmax(dim=1) == self.labels).double().mean())


def divided(whole: Outputs, held_out: int, draw: int) -> tuple[Outputs, Outputs]:
    """The images that choose and those that judge; draw 0: the first `held_out` choose."""
    count = len(whole.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(draw)) if draw else torch.arange(count)
    return whole.some(order[:held_out]), whole.some(order[held_out:])


def measured(
    name: str,
    criterion: str,
    whole: Outputs,
    held_out: int,
    draws: int,
    bound: dict[str, float],
    assurance: float | None,
) -> BoundRow:
    """One bound on `draws` divisions; whole: of the held-out images, then of the test images."""
    drops, costs, seconds = [], [], 0.0
    for draw in range(draws):
        choose, judge = divided(whole, held_out, draw)
        begin = time.process_time()
        try:
            found = calibrate(choose.exits, choose.labels, whole.cost, criterion, assurance=assurance, **bound)
        except ValueError:
            continue
        finally:
            seconds += time.process_time() - begin
        accuracy, cost = outcome(judge.exits, judge.labels, whole.cost, criterion, found.thresholds)
        drops.append(judge.final_accuracy() - accuracy)
        costs.append(cost)
    ((kind, most),) = bound.items()
    return BoundRow(
        bounded=name,
        criterion=criterion,
        bound=bound,
        assurance=assurance,
        images=held_out,
        new_images=len(whole.labels) - held_out,
        draws=draws,
        refused=draws - len(drops),
        broken=sum(value > most + 1e-9 for value in (costs if kind == "max_cost" else drops)),
        drops=(sum(drops) / len(drops), max(drops)) if drops else None,
        costs=(sum(costs) / len(costs), max(costs)) if costs else None,
        seconds=seconds / draws,
    )


def table(rows: Sequence[BoundRow]) -> list[str]:
    """A line per row."""
    title = ["criterion", "bound", "assurance", "broken", "refused", "mean drop", "mean cost", "seconds"]
    lines = []
    for row in rows:
        bound = ", ".join(f"{name} {value:g}" for name, value in row.bound.items())
        drop, cost = (f"{figures[0]:.4f}" if figures else "" for figures in (row.drops, row.costs))
        counts = f"{row.broken} of {row.draws}", f"{row.refused}"
        lines.append([row.criterion, bound, f"{row.assurance or 'none'}", *counts, drop, cost, f"{row.seconds:.2f}"])
    return aligned(title, lines, numbers=True)


def outputs_of(net: EarlyExitNet, held_out: Images, test: Images) -> Outputs:
    """Of the held-out images, then of the test images."""
    seen, asked = held_out.outputs(net, "held out"), test.outputs(net, "test")
    exits = [ExitOutput(*(torch.cat(p) for p in zip(*pair, strict=True))) for pair in zip(seen, asked, strict=True)]
    return Outputs(exits, torch.cat([held_out.labels, test.labels]), net.cost)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--draws", type=int, default=20, help="how often the images are divided; 20")
    parser.add_argument("--criteria", nargs="+", default=["max_probability"], help="default: max_probability")
    arguments = parser.parse_args()
    if arguments.draws < 1:
        parser.error(f"--draws {arguments.draws} must be at least 1")
    around = environment("cpu")
    for net, held_out, test in with_data(arguments.networks, arguments.data_root):
        whole = outputs_of(net, held_out, test)
        cases = [(c, bound, a) for c in arguments.criteria for bound in BOUNDS for a in ASSURANCES]
        rows = [
            measured(name_of(net), criterion, whole, len(held_out.labels), arguments.draws, bound, assurance)
            for criterion, bound, assurance in track(cases, "bounds")
        ]
        append(rows, around)
        print(f"{name_of(net)}, {arguments.draws} draws of {len(held_out.labels):,} images that choose thresholds")
        print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    run_command(main)
