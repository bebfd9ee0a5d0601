"""The list of commands, and words that name none."""

import subprocess
import sys

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from eefast.cli.commands import app
from eefast.cli.ending import Stopped
from eefast.version import __version__


def test_unknown_commands_exit_with_2():
    done = subprocess.run([sys.executable, "-m", "eefast", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr


COMMANDS = [
    "demo",
    "train",
    "search",
    "calibrate",
    "quantize",
    "evaluate",
    "predict",
    "score",
    "serve",
    "export",
    "bench",
    "plot",
    "calibrate-device",
    "env",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_listed_and_knows_its_options(command):
    listing = CliRunner().invoke(app, ["--help"])
    assert listing.exit_code == 0
    assert f" {command} " in listing.stdout
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, [command, "--nett", "eenet20"]).exit_code == 2


def test_no_command_is_without_a_test():
    assert sorted(command.name for command in app.registered_commands) == sorted(COMMANDS)


@pytest.mark.parametrize("words", [["-h"], ["train", "-h"]])
def test_help_has_a_short_name(words):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0
    assert done.stdout == CliRunner().invoke(app, [*words[:-1], "--help"]).stdout


def test_the_version_is_that_of_the_package():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"eefast {__version__}\n")


def test_completion_is_offered():
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).stdout


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "plot", "bench", "quantize", "score", "predict"])
def test_shared_options_are_grouped(command):
    """Under the same titles in every command; only what is the command's alone is in the first list."""
    known = {o.opts[0]: getattr(o, "rich_help_panel", None) for o in get_command(app).commands[command].params}
    titles = {"--data-root": "Data", "--max-cost": "Thresholds", "--workers": "Machine", "--json": "Run and output"}
    shared = {
        name: title for name, title in titles.items() if name in known and (command, name) != ("score", "--workers")
    }
    assert shared
    assert {name: known[name] for name in shared} == shared


def test_what_to_do_next_is_said_on_stderr(monkeypatch):
    monkeypatch.setattr("eefast.measure.installation.inspect_installation", lambda: {"eefast": "x"})
    done = CliRunner().invoke(app, ["env"])
    assert done.stderr.startswith("next: ")
    assert "next" not in done.stdout
    assert CliRunner().invoke(app, ["env", "--json", "-"]).stderr == ""


def test_a_file_that_ends_too_early_is_no_ctrl_d(monkeypatch):
    """For which Typer would take the `EOFError`."""

    def ends():
        raise EOFError("the image is cut off")

    monkeypatch.setattr("eefast.measure.installation.inspect_installation", ends)
    done = CliRunner().invoke(app, ["env"])
    assert isinstance(done.exception, RuntimeError)
    assert str(done.exception) == "a file ended too early: the image is cut off"


def test_ctrl_c_keeps_its_text(monkeypatch):
    """Which Typer would drop."""

    def stops():
        raise KeyboardInterrupt("--resume goes on")

    monkeypatch.setattr("eefast.measure.installation.inspect_installation", stops)
    with pytest.raises(Stopped, match="--resume goes on"):
        CliRunner().invoke(app, ["env"])
