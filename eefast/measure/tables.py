"""Cells → tables: Markdown, plain or aligned for a terminal, too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int | None = 1) -> list[str]:
    """Lines of a table; the first `left` columns to the left, the others to the right, None: no alignment."""
    words, numbers = (len(titles), 0) if left is None else (left, len(titles) - left)
    return [line(titles), "|" + "---|" * words + "---:|" * numbers, *map(line, rows)]


def aligned(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = False) -> list[str]:
    """Markdown whose columns line up; numbers: columns with a digit first in a cell go to the right."""
    table = [list(titles), *map(list, rows)]
    columns = []
    for column in zip(*table, strict=True):
        width = max(map(len, column))
        right = numbers and any(cell[:1].isdigit() for cell in column[1:])
        edge = "-" * (width + 1) + (":" if right else "-")
        columns.append([edge, *(cell.rjust(width) if right else cell.ljust(width) for cell in column)])
    edges, *lines = zip(*columns, strict=True)
    first, *others = map(line, lines)
    return [first, f"|{'|'.join(edges)}|", *others]
