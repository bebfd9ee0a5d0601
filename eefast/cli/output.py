"""Where a command's words, progress, tables, JSON and pictures go."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..system import files

if TYPE_CHECKING:
    from ..model import EarlyExitNet
    from ..thresholds.evaluation import ExitQuality
    from ..thresholds.scaling import Scaling

talk = Console(stderr=True)

ECE_WORDS = (
    "all images at each exit; ECE: expected calibration error (15 bins)\n"
    "of the largest probability and of the learned confidence"
)


def say(what: str | Table = "") -> None:
    """To stdout; a text's lines are not broken, so that paths and code can be copied."""
    with _stdout():
        Console().print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str))


def note(text: str) -> None:
    """To stderr: what was taken where nothing was said."""
    talk.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _stdout() -> Iterator[None]:
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise files.WriteError(f"stdout cannot be written: {error.strerror}") from error


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one per kind of work: called with (what, steps done, steps in all)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=talk) as shown:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield progress


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    out = Table(box=None, header_style="bold", pad_edge=False)
    for i, title in enumerate(titles):
        out.add_column(title, justify="left" if i == 0 else "right")
    for row in rows:
        out.add_row(*row)
    return out


def quality_table(
    net: EarlyExitNet,
    quality: Sequence[ExitQuality],
    *,
    before: Sequence[ExitQuality] | None = None,
    scaling: Scaling | None = None,
    right: Sequence[int] = (),
    wrong: Sequence[int] = (),
) -> Table:
    """A line per exit: who leaves there, where known, and what it would be worth for all images.

    before: `scaling`, where there is one; right, wrong: images that leave there.
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


def words(net: EarlyExitNet) -> str:
    return f"{net.name} with {net.num_exits} early exits"


def counts(images: Iterable[Any]) -> str:
    return " ".join(str(int(count)) for count in images)


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """path: a file, "-" for stdout, or "" for nowhere."""
    text = json.dumps(figures, indent=2) + "\n"
    if path == "-":
        with _stdout():
            print(text, end="")
    elif path:
        files.write(path, text)


def check_figure(path: Path) -> None:
    """`ImportError` without matplotlib, `ValueError` for a kind of picture or a place that it cannot write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    kinds = FigureCanvasAgg.get_supported_filetypes()
    if _kind(path) not in kinds:
        raise ValueError(f"{path} cannot be drawn: its ending must be one of {', '.join(sorted(kinds))}")
    files.check(path)


@contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure, in inches, that is saved in the end; see `check_figure`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    try:
        yield figure
        drawn = BytesIO()
        figure.savefig(drawn, format=_kind(path), dpi=120)
        files.write(path, drawn.getbuffer())
    finally:
        pyplot.close(figure)


def _kind(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"
