"""Results of a command → the lines and tables that it prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from ..model import EarlyExitNet
    from ..thresholds.benefit import BenefitPoint
    from ..thresholds.calibration import Calibration
    from ..thresholds.comparing import Comparison
    from ..thresholds.evaluation import Evaluation, ExitQuality, Flips
    from ..thresholds.scaling import Scaling

ECE_LEGEND = (
    "all images at each exit; ECE: expected calibration error (15 bins)\n"
    "of the largest probability and of the learned confidence"
)
# Rows of the table of classes; with more classes, the least accurate ones.
MOST_CLASSES = 20


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(titles):
        out.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def describe(net: EarlyExitNet) -> str:
    return f"{net.name} with {net.num_exits} early exits"


def counts(images: Iterable[Any]) -> str:
    return " ".join(str(int(count)) for count in images)


def calibration_parts(
    chosen: Mapping[str, Calibration], exits: Mapping[str, Sequence[int]], impossible: Mapping[str, str]
) -> Iterator[str | Table]:
    """A row per criterion with thresholds, and a line for each criterion without.

    exits: images per exit, by criterion; impossible: criterion → why no thresholds keep the budget.
    """
    rows = [[name, f"{c.accuracy:.2%}", f"{c.cost:.4f}", counts(exits[name])] for name, c in chosen.items()]
    yield table(["criterion", "accuracy", "mean cost", "images per exit"], rows)
    for name, why in impossible.items():
        yield f"{name}: {why}"


def comparison_table(compared: Mapping[str, Comparison]) -> Table:
    """A row per criterion."""
    rows = [[name, f"{c.accuracy:.2%}", _points(c)] for name, c in compared.items()]
    return table(["criterion", "accuracy at equal cost", "points above max_probability"], rows)


def winner(compared: Mapping[str, Comparison], at: float) -> str:
    """Which criterion is the most accurate at the mean cost `at`, and by how much."""
    from ..thresholds.comparing import BASE, SPLITS

    name, best = max(compared.items(), key=lambda item: item[1].gain)
    over = f"mean cost {at:.4f}, over {SPLITS} divisions of these images into those that choose and those that judge"
    if best.gain <= 0:
        others = {n: c for n, c in compared.items() if n != BASE}
        name, best = max(others.items(), key=lambda item: item[1].gain)
        return f"{BASE} is the most accurate at {over}; {name}: {_points(best)} points"
    unclear = "; less than the spread, so another one may be better on new images" * (best.gain < best.spread)
    return f"{name} is the most accurate at {over}: {_points(best)} points above {BASE}{unclear}"


def _points(compared: Comparison) -> str:
    return f"{100 * compared.gain:+.2f} ± {100 * compared.spread:.2f}"


def benefit_table(points: Sequence[BenefitPoint], macs: int) -> Table:
    """A row per threshold; of neighbours with the same outcome, the first. macs: of the network without exits."""
    rows: list[list[str]] = []
    for point in points:
        row = [f"{point.threshold:.4g}", f"{point.cost:.4f}", f"{point.cost * macs / 1e6:.4g}", f"{point.accuracy:.2%}"]
        if not rows or rows[-1][1:] != row[1:]:
            rows.append(row)
    return table(["threshold", "mean cost", "10⁶ MACs", "accuracy"], rows)


def profile_table(profiles: Mapping[str, Calibration]) -> Table:
    """A row per profile."""
    rows = [
        [name, c.criterion, f"{c.accuracy:.2%}", f"{c.cost:.4f}", "" if c.assurance is None else f"{c.assurance:g}"]
        for name, c in profiles.items()
    ]
    return table(["profile", "criterion", "accuracy", "mean cost", "assurance"], rows)


def assurance(chosen: Mapping[str, Calibration]) -> str:
    """What thresholds of all criteria promise of new images."""
    found = next(iter(chosen.values()))
    if found.assurance is None:
        return "the budget is kept on these images; new ones may break it"
    return (
        f"each row keeps the budget on new images of this kind with probability {found.assurance:g}, as "
        f"{found.judged_by:,} of these images judged"
    )


def evaluation_parts(found: Evaluation, flips: Flips) -> Iterator[str]:
    """A line per figure of the whole data set."""
    furthest = f", at most {flips.distance:.1g} from a threshold" if flips.count else ""
    for what, figure in (
        ("accuracy", f"{found.accuracy:.2%}"),
        ("mean cost", f"{found.mean_cost:.4f}"),
        ("including heads passed", f"{found.mean_path_cost:.4f}"),
        ("other exit than net.eval()", f"{flips.count:,} images{furthest}"),
    ):
        yield f"{what:28}{figure}"


def quality_table(
    net: EarlyExitNet,
    quality: Sequence[ExitQuality],
    *,
    before: Sequence[ExitQuality] | None = None,
    scaling: Scaling | None = None,
    right: Sequence[int] = (),
    wrong: Sequence[int] = (),
) -> Table:
    """A row per exit: the images that exit there, where given, and its accuracy on all images.

    before: quality without `scaling`, where there is one; right, wrong: number of images that exit there.
    """
    titles = ["exit", "cost", *(["images", "wrong"] if right else []), "accuracy", "ECE", "ECE learned"]

    def errors(q: ExitQuality) -> tuple[str, str]:
        return f"{q.probability_error:.4f}", f"{q.confidence_error:.4f}"

    rows = []
    for i, (q, cost) in enumerate(zip(quality, net.cost.tolist(), strict=True)):
        row = [str(i), f"{cost:.3f}", *([f"{right[i] + wrong[i]:,}", f"{wrong[i]:,}"] if right else [])]
        shown = [errors(q)] if before is None else [errors(before[i]), errors(q)]
        row += [f"{q.accuracy:.2%}", *map(" → ".join, zip(*shown, strict=True))]
        if scaling is not None:
            row += [f"{scaling.temperature[i]:.2f}", f"{scaling.slope[i]:.2f} · z {scaling.offset[i]:+.2f}"]
        rows.append(row)
    return table(titles + (["temperature", "row"] if scaling is not None else []), rows)


def class_parts(found: Evaluation, names: Sequence[Any]) -> Iterator[str | Table]:
    """A row per class that has images, of at most `MOST_CLASSES`; names: of the classes, in the order of the labels."""
    from ..data.image_files import shown

    accuracy = {label: a for label, a in enumerate(found.class_accuracy) if a is not None}
    listed = sorted(accuracy, key=accuracy.__getitem__)[:MOST_CLASSES] if len(accuracy) > MOST_CLASSES else accuracy
    rows = []
    for label in listed:
        exits = found.class_exits[label]
        rows.append([shown(names[label]), f"{sum(exits):,}", f"{accuracy[label]:.2%}", counts(exits)])
    yield table(["class", "images", "accuracy", "images per exit"], rows)
    if len(listed) < len(accuracy):
        yield f"the {MOST_CLASSES} least accurate of {len(accuracy)} classes; --json has all"
