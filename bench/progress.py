"""Say on stderr what is being measured: a bar at a terminal, a line per item in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items one after the other, reported as they begin."""
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ImportError:
        at_terminal = False
    else:
        at_terminal = sys.stderr.isatty()
    if at_terminal:
        yield from bar(items, what, console=Console(stderr=True), transient=True)
        return
    begin = time.perf_counter()
    for i, item in enumerate(items):
        passed = time.perf_counter() - begin
        print(f"{passed:6.1f} s  {what} {i + 1}/{len(items)}: {item}", file=sys.stderr, flush=True)
        yield item
