"""Examples, run as a user runs them in an empty folder: short, and what they print is right."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SHOWN = {
    "evaluation_loop": r"accuracy with early exits (?P<early>0\.9[78]\d)\naccuracy without (?P<plain>0\.9[89]\d)\n",
    "own_backbone": r"\w+ engine, accuracy 0\.[89]\d+, mean cost 0\.\d+, images per exit \[\d+, \d+, \d+\]\n",
    "timm_backbone": r"compact engine, cost of each exit \[0\.2\d+, 0\.5\d+, 1\.0\], images per exit \[.*\]\n",
    "train_on_folder": r"accuracy of the final exit on held-out images (0\.9|1\.0)\d*\nred: red, .*\nblue: blue, .*\n",
    "lightning_predict": r"(?s).*accuracy 0\.98\d, images per exit \[(\d+, ){5}\d+\]\n",
    "serve_and_ask": r"(19|20) of 20 images are right\n",
    "score_with_ray": r"(?s).*400 images, mean cost 0\.\d+\n.*mean exit \d\.\d+\n",
}
NEEDS = {"timm_backbone": "timm", "score_with_ray": "ray", "serve_and_ask": "uvicorn", "lightning_predict": "lightning"}
QUICK = ("evaluation_loop",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SHOWN]
)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    if name == "score_with_ray":
        pytest.importorskip("pandas", reason="pandas, which Ray Data reads columns with, is not installed")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    out = capsys.readouterr().out
    found = re.fullmatch(SHOWN[name], out)
    assert found, out
    if name == "evaluation_loop":
        assert float(found["early"]) < float(found["plain"])


def test_every_example_has_a_test() -> None:
    tested = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(path.stem in SHOWN or f'"{path.name}"' in tested for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_say_what_they_do(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) < 60
    assert re.match(r'"""[A-Z].* → .*\."""$', lines[0])
