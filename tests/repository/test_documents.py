"""The documents for developers: every file and function that they name exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = (
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "docs/design.md",
    "docs/exporting.md",
    "docs/extending.md",
    "docs/performance.md",
    "docs/quantization.md",
    "docs/reliability.md",
    "docs/scoring.md",
    "docs/search.md",
    "docs/serving.md",
)
# Where the documents leave out the first folder.
FOLDERS = (".", "eefast")


def text(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document: str) -> None:
    named = set(re.findall(r"`(?:python )?([\w./-]+\.(?:py|cpp|h|cuh|cu|sh|md|toml))\b", text(document)))
    named |= {f"{Path(document).parent}/{link}" for link in re.findall(r"\]\((?!\s*http)([^)#]+)\)", text(document))}
    assert named
    # A name without a folder is that of a file in the folder that the sentence is about.
    bare = {path.name for path in (ROOT / "eefast").rglob("*.py")}
    missing = [
        name
        for name in named
        if "NAME" not in name and name not in bare and not any((ROOT / folder / name).exists() for folder in FOLDERS)
    ]
    assert not missing


def tasks() -> list[str]:
    """The rows of the table under "Where would you change", each with files."""
    rows = re.findall(r"^\| (?!task|---)(.*) \|$", text("CONTRIBUTING.md").split("### Where would you change")[1], re.M)
    return [row for row in rows if "`EEFAST" not in row and ".py`" in row]


def test_ten_tasks_are_answered() -> None:
    assert len(tasks()) >= 10


@pytest.mark.parametrize(("file", "name"), re.findall(r"`([\w/.]+)` \(`(\w+)`", " ".join(tasks())))
def test_the_tasks_name_functions_that_exist(file: str, name: str) -> None:
    """Names in brackets are in the file before them."""
    assert re.search(rf"\b{name}\b", (ROOT / file).read_text())
