"""Every environment variable that the code reads has a row in CONTRIBUTING's table, and no row is out of date."""

import ast
import re
from pathlib import Path

import eefast

ROOT = Path(eefast.__file__).parent.parent
NAME = re.compile(r"[A-Z][A-Z0-9_]*[A-Z0-9]")


def read_by_python(path):
    """All-capital strings in statements that use os.environ or os.getenv."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        parts = list(ast.walk(node))
        nested = sum(isinstance(part, ast.stmt) for part in parts) > 1
        if not isinstance(node, ast.stmt | ast.expr) or (isinstance(node, ast.stmt) and nested):
            continue
        if any(isinstance(part, ast.Attribute) and part.attr in ("environ", "getenv") for part in parts):
            found |= {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return {text for text in found if NAME.fullmatch(text)}


def read_by_cpp(path):
    """All-capital string literals of a file that calls getenv."""
    text = path.read_text()
    return set(re.findall(rf'"({NAME.pattern})"', text)) if "getenv" in text else set()


def test_the_table_lists_what_the_code_reads():
    python = [*(ROOT / "eefast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py"), ROOT / "eefast_command.py"]
    python += [ROOT / "setup.py", ROOT / "tests" / "conftest.py"]
    cpp = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".inc")]
    read = set().union(*map(read_by_python, python), *map(read_by_cpp, cpp))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.search(r"\| variable \| effect \|\n\|---\|---\|\n((?:\|.*\n)+)", text)[1].splitlines()
    listed = {name for row in rows for name in re.findall(rf"`({NAME.pattern})", row.split("|")[1])}
    assert read - listed == set(), "read by the code, but not in CONTRIBUTING's table"
    assert listed - read == set(), "in CONTRIBUTING's table, but read nowhere"


def test_reading_is_recognised(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        'import os\nFLAG = "NOT_READ"\nhomes = [os.environ.get(name) for name in ("ONE", "TWO")]\n'
        'if "THREE" in os.environ:\n    print("NOT_READ")\nx = os.getenv("FOUR_4") == "1"\nos.environ["FIVE"]\n'
    )
    assert read_by_python(path) == {"ONE", "TWO", "THREE", "FOUR_4", "FIVE"}
    path.write_text('auto x = std::getenv("SIX"); variable("SEVEN"); throw Error("EIGHT=" + x);')
    assert read_by_cpp(path) == {"SIX", "SEVEN"}
