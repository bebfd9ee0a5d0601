"""The site: every document is on it, links lead somewhere, the drawing is the command's, commands and code run."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import run
from networks import lived_in
from pictures import photograph
from typer.main import get_command

from eefast import Preprocessing, zoo
from eefast.cli.commands import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = ("quick-start.md", "concepts.md", "choosing-thresholds.md")
MADE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "environment.md")


def on_the_site(entries: list) -> list[str]:
    values = [value for entry in entries for value in entry.values()]
    return [page for value in values for page in (on_the_site(value) if isinstance(value, list) else [value])]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def commands(page: str, language: str) -> list[str]:
    joined = "".join(blocks(page, language)).replace("\\\n", " ")
    return [line.partition("  #")[0] for line in joined.splitlines() if line.startswith("eefast ")]


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
    line for path in sorted(DOCS.glob("*.md")) for kind in ("bash", "console") for line in commands(path.name, kind)
]


@pytest.mark.parametrize("line", SHOWN)
def test_commands_have_the_options_shown(line: str) -> None:
    command, *words = shlex.split(line)[1:]
    known = get_command(app).params if command.startswith("-") else get_command(app).commands[command].params
    options = {word for parameter in known for word in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in [command, *words] if word.startswith("--")} <= options


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of two classes, and a network for them."""
    folder = tmp_path_factory.mktemp("site")
    for split, count in (("train", 60), ("val", 3)):
        for seed, name in enumerate(("cat", "dog")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                photograph(36, 40, seed=seed).save(folder / "photos" / split / name / f"{i}.png")
    normalization = ((0.5,) * 3, (0.25,) * 3)
    net = lived_in(zoo.eenet("eenet8", num_classes=2, input_shape=(3, 32, 32), normalization=normalization), 1)
    net.preprocessing, net.classes = Preprocessing(32), ("cat", "dog")
    net.save(folder / "runs/mine")
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict = {}
    assert blocks(page, "python")
    for code in blocks(page, "python"):
        exec(compile(code, page, "exec"), names)
    assert names["net"].num_classes == 2


@pytest.mark.slow
def test_a_newcomer_gets_from_photographs_to_answers(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the quick start and those for thresholds, as they are written."""
    monkeypatch.chdir(place)
    lines = [line for page in ("quick-start.md", "choosing-thresholds.md") for line in commands(page, "bash")]
    assert len(lines) == 6
    shown = [run(*shlex.split(line)[1:]).stdout for line in lines]
    assert "cat" in shown[2]
    assert "dog" in shown[2]
