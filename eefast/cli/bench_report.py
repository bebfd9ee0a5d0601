"""An assessment → the text, tables and figure that `eefast bench` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .choices import excess
from .pictures import canvas
from .render import counts, describe, table

if TYPE_CHECKING:
    from ..measure.assessment import Assessment
    from ..measure.comparison import Row
    from ..thresholds.calibration import Calibration
    from .choices import Choice

LEGEND = (
    "× static: speed ÷ the fastest way without early exits, in the same rounds\n"
    "realised ratio: mean cost × that; 1 = all that theory promises\n"
    "20 % … 80 %: quantiles of images/s over the rounds; exits off: no image exits early, the gain of the engine alone"
)


def parts(
    found: Assessment, choice: Choice, dataset: str, dtype: str, budget: tuple[str, float] | None, code: str
) -> Iterator[str | Table]:
    """What is printed, part by part. budget: kind and value, None where nothing was chosen; code: lines of Python."""
    from ..measure import verdicts

    net, early = choice.net, found.early
    timed = found.rows[0].images
    yield f"\n{describe(net)}, {dtype}, {early.images:,} test images of {dataset}, {timed:,} of them timed\n"
    yield criteria_table(found, choice.chosen, dtype)
    yield from (f"{name}: {why}" for name, why in choice.impossible.items())
    origin = "the network's own" if budget is None else f"the best for {budget[0]} {budget[1]:g}"
    yield f"\n{origin}: {net.criterion.name}, thresholds {', '.join(f'{t:.4f}' for t in net.thresholds.tolist())}"
    yield f"images per exit: {counts(right + wrong for right, wrong in zip(early.right, early.wrong, strict=True))}"
    for size in dict.fromkeys(row.batch_size for row in found.rows):
        yield ""
        yield speed_table([row for row in found.rows if row.batch_size == size])
    yield f"\n{LEGEND}\n"
    exits = [right + wrong for right, wrong in zip(early.right, early.wrong, strict=True)]
    for of_time in found.time_costs:
        costs = ", ".join(f"{c:.3f}" for c in of_time.cost)
        mean = f"mean cost {early.mean_cost:.3f} in MACs, {of_time.mean(exits):.3f} in time"
        each = f"time to each exit ÷ the plain network's, {of_time.way}: {costs}"
        yield f"batch {of_time.batch_size}: {mean}; {each}"
    for verdict in found.verdicts:
        yield f"batch {verdict.batch_size}: {verdicts.sentence(verdict, early.accuracy - found.plain_accuracy)}"
        if more := verdicts.int8_sentence([row for row in found.rows if row.batch_size == verdict.batch_size]):
            yield f"batch {verdict.batch_size}: {more}"
    if budget is not None and (exceeded := excess(found, *budget)):
        yield exceeded
    yield f'engine="auto" takes {found.auto}'
    yield from (f"not compared: {name}, {why}" for name, why in found.left_out.items())
    yield f"\n{code or 'keep the network without early exits'}\n"


def criteria_table(found: Assessment, chosen: Mapping[str, Calibration], dtype: str) -> Table:
    """Thresholds are chosen in float32, the answers to test images are in `dtype`."""
    rows = [["final exit", "", "", f"{found.plain_accuracy:.2%}", "1.0000"]]
    for name, (accuracy, cost) in found.criteria.items():
        held_out = [f"{chosen[name].accuracy:.2%}", f"{chosen[name].cost:.4f}"] if name in chosen else ["", ""]
        rows.append([name, *held_out, f"{accuracy:.2%}", f"{cost:.4f}"])
    both = ("held-out", "test") if dtype == "float32" else ("held-out, float32", f"test, {dtype}")
    return table(["criterion", both[0], "mean cost", both[1], "mean cost"], rows)


def speed_table(rows: Sequence[Row]) -> Table:
    """Of one batch size, measured against the fastest of them in float32 without early exits.

    With a row in INT8: the accuracy on the images that were timed, and other classes than in float32, instead of the
    quantiles.
    """
    beside = any(row.other_classes is not None for row in rows)
    more = ["accuracy", "other classes"] if beside else ["20 % … 80 %"]
    lines = []
    for row in rows:
        low, high = row.images_per_s_quantiles
        ratio = "" if row.criterion is None else f"{row.realised_ratio:.2f}"
        other = "" if row.other_classes is None else f"{row.other_classes:.2%}"
        cells = [f"{row.accuracy:.2%}", other] if beside else [f"{low:,.0f} … {high:,.0f}"]
        lines.append([row.name, f"{row.images_per_s:,.0f}", *cells, f"{row.speedup:.2f}", ratio])
    titles = [f"batch {rows[0].batch_size}", "images/s", *more, "× static", "realised ratio"]
    return table(titles, lines)


def draw(found: Assessment, path: Path, title: str) -> None:
    """Speed-ups over batch sizes, and accuracy against speed at the largest of them, under a title."""
    from ..measure import figures, verdicts

    speedups: dict[str, dict[int, float]] = {}
    for row in found.rows:
        speedups.setdefault(row.name, {})[row.batch_size] = row.speedup
    static = [row.name for row in found.rows if row.criterion is None]
    largest = max(row.batch_size for row in found.rows)
    final = {*static, *verdicts.EXITS_OFF.values()}
    points = {
        row.name: (row.images_per_s, found.plain_accuracy if row.name in final else found.early.accuracy)
        for row in found.rows
        if row.batch_size == largest and row.other_classes is None  # accuracy in INT8 is known of timed images only
    }
    curve = [(point.images_per_s, point.accuracy) for point in found.curve]
    with canvas(path, 11, 4.6) as drawn:
        drawn.suptitle(title, fontsize=11)
        left, right = drawn.subplots(1, 2)
        figures.speedup_over_batch_size(left, speedups, static)
        figures.accuracy_against_speed(right, points, static, curve, f"{found.auto}, other thresholds")
        right.set_title(f"batch {largest}", fontsize=10)
