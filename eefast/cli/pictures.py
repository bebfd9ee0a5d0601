"""A picture's path → a matplotlib figure, which is saved there when it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from ..system import files


def check_picture(path: Path) -> None:
    """`ImportError` without matplotlib, `ValueError` for a file type or a place that it cannot write."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    types = FigureCanvasAgg.get_supported_filetypes()
    if _type(path) not in types:
        raise ValueError(f"{path} cannot be drawn: its ending must be one of {', '.join(sorted(types))}")
    files.check(path)


@contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure, in inches, that is saved at the end; see `check_picture`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(width, height), layout="constrained")
    try:
        yield figure
        drawn = BytesIO()
        figure.savefig(drawn, format=_type(path), dpi=120)
        files.write(path, drawn.getbuffer())
    finally:
        pyplot.close(figure)


def _type(path: Path) -> str:
    return path.suffix.removeprefix(".").lower() or "png"
