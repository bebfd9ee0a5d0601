"""Output: results to stdout, notes and progress to stderr, JSON where it was asked for."""

import json
import sys
from pathlib import Path

import pytest
from rich.table import Table

from eefast.cli import output
from eefast.system import files
from eefast.system.files import WriteError

FIGURES = {"accuracy": 0.5, "exits": [1, None]}


def test_lines_can_be_copied(capsys):
    """They are not broken at the width of the terminal, and brackets are no markup."""
    line = "/a/long/path " * 40 + "[bold]x[/bold]"
    output.echo(line)
    output.echo()
    assert capsys.readouterr() == (f"{line}\n\n", "")


def test_tables_go_to_stdout_and_notes_to_stderr(capfd):
    table = Table("title")
    table.add_row("cell")
    output.echo(table)
    output.note("chosen: [default] " * 20)
    out, err = capfd.readouterr()
    assert "title" in out
    assert "cell" in out
    assert err == "chosen: [default] " * 20 + "\n"


@pytest.mark.parametrize("place", ["-", "", "file"])
def test_json_goes_where_it_was_asked_for(capsys, tmp_path, place):
    output.write_json(str(tmp_path / "x.json") if place == "file" else place, FIGURES)
    written = capsys.readouterr().out
    assert (json.loads(written) == FIGURES) if place == "-" else written == ""
    found = [json.loads(path.read_text()) for path in tmp_path.iterdir()]
    assert found == ([FIGURES] if place == "file" else [])


@pytest.mark.parametrize("write", [lambda: output.echo("text"), lambda: output.write_json("-", FIGURES)])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_stdout_that_is_full_is_a_write_error(monkeypatch, write):
    file = Path("/dev/full").open("w")  # noqa: SIM115  closed below, which fails
    monkeypatch.setattr(sys, "stdout", file)
    with pytest.raises(WriteError, match="stdout cannot be written: No space left on device"):
        write()
    with pytest.raises(OSError, match="No space left"):
        file.close()


def test_a_closed_pipe_stays_what_it_is(monkeypatch):
    """It is not an error that a command reports, see `ending.run`."""

    class Closed:
        def flush(self):
            raise BrokenPipeError

        def write(self, text):
            return len(text)

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(BrokenPipeError):
        output.write_json("-", FIGURES)


def test_each_kind_of_work_has_its_bar(monkeypatch):
    """Whose length follows the total."""
    shown = []
    monkeypatch.setattr(output.Bars, "add_task", lambda self, what, total: shown.append(what) or what)
    monkeypatch.setattr(output.Bars, "update", lambda self, task, **more: shown.append((task, more)))
    with output.bars() as progress:
        progress("one", 0, 2)
        progress("two", 0, 5)
        progress("one", 1, 3)
    assert shown == [
        "one",
        ("one", {"completed": 0, "total": 2}),
        "two",
        ("two", {"completed": 0, "total": 5}),
        ("one", {"completed": 1, "total": 3}),
    ]


def test_every_file_is_checked_and_stdout_is_none(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        checked = []
        patch.setattr(files, "check", checked.append)
        output.check_writable("-", "a", "", None, tmp_path / "x.json")
        assert checked == ["a", tmp_path / "x.json"]
    with pytest.raises(ValueError, match=r"no/y\.json cannot be written: there is no folder"):
        output.check_writable("-", tmp_path / "x.json", tmp_path / "no" / "y.json")
