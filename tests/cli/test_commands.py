"""The list of commands, and words that name none."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from eefast.cli.commands import app
from eefast.cli.ending import Stopped


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
