"""`eefast demo`: a table, a picture and JSON of the shipped network; wrong usage is one line."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run

import eefast
from eefast import cli, ops
from eefast.measure import demonstration
from eefast.measure.demonstration import Demonstration

WORDS = ("demo", "--images", 64, "--rounds", 2)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Demonstration]:
    """The command, run once: what it printed, the folder with its files, and what was measured."""
    folder, found = tmp_path_factory.mktemp("demo"), []
    measure = demonstration.demonstrate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demonstration, "demonstrate", lambda *a, **k: found.append(measure(*a, **k)) or found[0])
        done = run(*WORDS, "--figure", folder / "figure.png", "--json", folder / "rows.json")
    return done, folder, found[0]


def test_the_command_prints_a_table_and_draws_a_picture(demo) -> None:
    done, folder, _ = demo
    rows = json.loads((folder / "rows.json").read_text())["rows"]
    assert len(rows) == 5 + (ops.CPP_MISSING is None)
    for row in rows:
        assert row["name"] in done.stdout
        assert f"{row['accuracy']:.2%}" in done.stdout
    assert "realised" in done.stdout
    assert "exit 0" in done.stdout
    assert "timing" in done.stderr
    assert (folder / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_json_on_stdout_is_nothing_but_json(demo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the same measurement, since another one would take seconds."""
    _, folder, found = demo

    def measured(*_: object, progress: Any, **__: object) -> Demonstration:
        progress("timing", 1, 1)
        return found

    monkeypatch.setattr(demonstration, "demonstrate", measured)
    done = run(*WORDS, "--figure", tmp_path / "figure.png", "--json", "-")
    data = json.loads(done.stdout)
    assert data == json.loads((folder / "rows.json").read_text())
    assert {"name", "images_per_s", "mean_cost", "accuracy", "realised_ratio"} <= set(data["rows"][0])
    assert {"torch", "processor", "threads", "commit", "cpp_kernels"} <= set(data["environment"])
    assert data["environment"]["eefast"] == eefast.__version__
    assert "timing" in done.stderr


def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    words = [*WORDS, "--figure", tmp_path / "no" / "folder.png"]
    monkeypatch.setattr(sys, "argv", ["eefast", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "folder.png cannot be written: there is no folder" in error
    assert len(error.splitlines()) == 1
