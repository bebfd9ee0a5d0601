"""The list of commands, and words that name none."""

import subprocess
import sys

from typer.testing import CliRunner

from eefast.cli.commands import app


def test_unknown_options_and_commands_exit_with_2():
    done = subprocess.run([sys.executable, "-m", "eefast", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr
    assert CliRunner().invoke(app, ["train", "--nett", "eenet20"]).exit_code == 2
    listing = CliRunner().invoke(app, ["--help"])
    assert listing.exit_code == 0
    for command in ("demo", "train", "calibrate", "evaluate", "bench", "plot", "calibrate-device", "env"):
        assert f" {command} " in listing.stdout
