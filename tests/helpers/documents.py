"""A document → its blocks of code, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """language: as the document names it, "" where it does not; line: that of the block's first line, from 1."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Those of a shell, one a line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [words for line in lines if (words := line.partition("  #")[0].partition(" # ")[0].strip())]


def blocks(page: str, *languages: str) -> list[Block]:
    """All of a page, a path from the root of the repository, in their order; of these languages only."""
    text = (ROOT / page).read_text()
    found = [Block(page, text.count("\n", 0, m.start(2)) + 1, m[1], m[2]) for m in FENCE.finditer(text)]
    return [block for block in found if not languages or block.language in languages]
