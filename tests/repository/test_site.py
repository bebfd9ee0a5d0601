"""The site: every document is on it, links lead somewhere, the drawing is the command's, options exist."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from documents import blocks
from typer.main import get_command

from eefast.cli.commands import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
MADE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "environment.md")


def on_the_site(entries: list) -> list[str]:
    values = [value for entry in entries for value in entry.values()]
    return [page for value in values for page in (on_the_site(value) if isinstance(value, list) else [value])]


def test_every_document_is_on_the_site_once() -> None:
    pages = on_the_site(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(pages) == sorted([*MADE, *(path.name for path in DOCS.glob("*.md"))])


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(\s*(?!http)([^)\s]+)\s*\)", (DOCS / page).read_text()):
        path, _, anchor = target.partition("#")
        there = DOCS / (path or page)
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_the_drawing_is_made_by_its_command(tmp_path: Path) -> None:
    shutil.copy(DOCS / "engines_drawing.py", tmp_path)
    runpy.run_path(str(tmp_path / "engines_drawing.py"), run_name="__main__")
    assert (tmp_path / "engines.svg").read_text() == (DOCS / "engines.svg").read_text()


SHOWN = [
    command
    for path in sorted(DOCS.glob("*.md"))
    for block in blocks(f"docs/{path.name}", "bash")
    for command in block.commands
    if command.startswith("eefast ")
]


@pytest.mark.parametrize("line", SHOWN)
def test_commands_have_the_options_shown(line: str) -> None:
    command, *words = shlex.split(line)[1:]
    known = get_command(app).params if command.startswith("-") else get_command(app).commands[command].params
    options = {word for parameter in known for word in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in [command, *words] if word.startswith("--")} <= options
