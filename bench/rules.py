"""A trained network and its data → the accuracy of every exit rule at equal mean cost on new images, as rows.

Images are divided as in bounds.py: those that were held out fit rules and lay paths of thresholds, the others judge.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product

import torch
from bounds import Outputs, divided, outputs_of
from command import run_command
from int8_accuracy import name_of, parser_of, with_data
from progress import track
from rows import RuleRow, append, environment

from eefast.measure.tables import aligned
from eefast.thresholds.candidates import ALL, make_candidate
from eefast.thresholds.comparing import BASE, accuracies_at, path_of

# Mean costs, in those of the first exit: named before anything was measured.
COSTS = (1.2, 1.4, 1.7, 2.0, 2.5, 3.0)


def measured(
    name: str, criteria: Sequence[str], whole: Outputs, held_out: int, splits: int, costs: Sequence[float] = ()
) -> list[RuleRow]:
    """A row per rule; whole: of the held-out images, then of the test images.

    costs: mean costs at which rules are compared; by default `COSTS` times that of the first exit.
    """
    costs = costs or [factor * float(whole.cost[0]) for factor in COSTS]
    names = list(dict.fromkeys((BASE, *criteria)))
    found: dict[str, list[list[float]]] = {criterion: [] for criterion in names}
    seconds = dict.fromkeys(names, 0.0)
    for split, criterion in track(list(product(range(splits), names)), name):
        choose, judge = divided(whole, held_out, split)
        begin = time.process_time()
        candidate = make_candidate(criterion, choose.exits, choose.labels)
        seconds[criterion] += time.process_time() - begin
        points = path_of(candidate, choose.exits, choose.labels, whole.cost)
        found[criterion].append(accuracies_at(candidate, points, judge.exits, judge.labels, whole.cost, costs))
    base = torch.tensor(found[BASE], dtype=torch.float64)
    rows = []
    for criterion in names:
        accuracy = torch.tensor(found[criterion], dtype=torch.float64)
        gains = accuracy - base
        rows.append(
            RuleRow(
                ruled=name,
                rule=criterion,
                images=held_out,
                new_images=len(whole.labels) - held_out,
                splits=splits,
                costs=tuple(costs),
                accuracy=tuple(accuracy.mean(dim=0).tolist()),
                gains=tuple(gains.mean(dim=0).tolist()),
                spreads=tuple(gains.std(dim=0, correction=0).tolist()),
                first=tuple(accuracy[0].tolist()),
                seconds=seconds[criterion] / splits,
            )
        )
    return rows


def table(rows: Sequence[RuleRow]) -> list[str]:
    """A line per rule: its points above the largest probability, and for that itself the accuracy."""
    title = ["criterion", *(f"cost {cost:.3f}" for cost in rows[0].costs), "seconds"]
    lines = []
    for row in rows:
        if row.rule == BASE:
            cells = [f"{accuracy:.2%}" for accuracy in row.accuracy]
        else:
            cells = [f"{100 * g:+.2f} ± {100 * s:.2f}" for g, s in zip(row.gains, row.spreads, strict=True)]
        lines.append([row.rule, *cells, f"{row.seconds:.2f}"])
    return aligned(title, lines, numbers=True)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--splits", type=int, default=20, help="how often the images are divided; 20")
    parser.add_argument(
        "--costs", nargs="+", type=float, default=[],
        help=f"mean costs to compare at; default: {', '.join(map(str, COSTS))} times that of the first exit",
    )  # fmt: skip
    parser.add_argument("--criteria", nargs="+", default=list(ALL), help="default: all")
    arguments = parser.parse_args()
    if arguments.splits < 1:
        parser.error(f"--splits {arguments.splits} must be at least 1")
    around = environment("cpu")
    for net, held_out, test in with_data(arguments.networks, arguments.data_root):
        whole = outputs_of(net, held_out, test)
        rows = measured(
            name_of(net), arguments.criteria, whole, len(held_out.labels), arguments.splits, arguments.costs
        )
        append(rows, around)
        print(f"{name_of(net)}, {arguments.splits} divisions, {len(held_out.labels):,} images fit and choose")
        print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    run_command(main)
