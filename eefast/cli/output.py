"""A command's output → stdout (results, JSON), stderr (notes, progress) and files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..system import files
from ..system.progress import Progress
from ..system.strict_json import json_text

stderr = Console(stderr=True)


def echo(what: str | Table = "") -> None:
    """To stdout; a text's lines are not broken, so that paths and code can be copied."""
    with _stdout():
        Console().print(what, highlight=False, markup=False, soft_wrap=isinstance(what, str))


def note(text: str) -> None:
    """To stderr: a value that was chosen because no option names it, or a warning."""
    stderr.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)


def next_step(text: str) -> None:
    """To stderr: what to do after this command."""
    stderr.print(f"next: {text}", highlight=False, markup=False, soft_wrap=True)


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
def bars() -> Iterator[Progress]:
    """Progress bars on stderr, one per kind of work."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bars(*columns, console=stderr) as shown:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield progress


def write_json(path: str, figures: Mapping[str, Any]) -> None:
    """path: a file, "-" for stdout, or "" for nowhere."""
    text = json_text(figures)
    if path == "-":
        with _stdout():
            print(text, end="")
    elif path:
        files.write(path, text)


def check_writable(*paths: str | Path | None) -> None:
    """`ValueError` unless the files could be written; "-" is stdout."""
    for path in paths:
        if path and path != "-":
            files.check(path)
