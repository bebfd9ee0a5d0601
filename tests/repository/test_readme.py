"""The README: its commands exist, its numbers are in a committed row."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from eefast.cli.commands import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROWS = json.loads((ROOT / "bench/results/demo.json").read_text())["rows"]


TARGETS = sorted(set(re.findall(r"\bmake ([a-z0-9-]+)", README)))
COMMANDS = re.findall(r"^eefast ([a-z-]+ .* --.*)$", README, re.MULTILINE)


@pytest.mark.parametrize("target", TARGETS)
def test_make_targets_exist(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_take_the_options_shown(line):
    command, *words = line.split()
    known = get_command(app).commands[command].params
    options = {word for parameter in known for word in (*parameter.opts, *parameter.secondary_opts)}
    assert {word for word in words if word.startswith("-") and word != "-"} <= options


def test_the_first_steps_are_shown():
    assert {"demo", "test"} <= set(TARGETS)
    assert {"train", "calibrate", "evaluate", "plot", "bench"} <= {line.split()[0] for line in COMMANDS}


def test_the_table_is_the_committed_run():
    lines = [line for line in README.splitlines() if any(line.startswith(row["name"]) for row in ROWS)]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS, strict=True):
        numbers = line.removeprefix(row["name"]).split()
        assert numbers == [
            f"{row['images_per_s']:,.0f}",
            f"{row['realised_ratio'] / row['mean_cost']:.1f}",
            f"{row['mean_cost']:.3f}",
            f"{row['accuracy']:.2%}",
            f"{row['realised_ratio']:.2f}",
        ]
    assert "eefast demo --json bench/results/demo.json" in README


def test_first_screen_names_the_two_commands():
    first = "\n".join(README.splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first
