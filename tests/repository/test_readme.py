"""The README: its code runs, its commands exist, its numbers are in a committed row."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROWS = json.loads((ROOT / "bench/results/demo.json").read_text())["rows"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python")) >= 2
    names = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["result"].labels.shape == (256,)
    assert (tmp_path / "runs/mine-again/model.safetensors").is_file()


def test_make_targets_exist():
    used = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"demo", "test"} <= used
    for target in used:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_commands_take_the_options_shown():
    commands = re.findall(r"^eefast ((?:demo|train|bench) .*)$", README, re.MULTILINE)
    assert commands
    for line in commands:
        command, *words = line.split()
        run = [sys.executable, "-m", "eefast", command, "--help"]
        help_text = subprocess.run(
            run, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "200"}
        ).stdout
        for option in (w for w in words if w.startswith("--")):
            assert option in help_text, f"eefast {command} has no {option}"


def test_the_table_is_the_committed_run():
    lines = [line for line in README.splitlines() if any(line.startswith(row["name"]) for row in ROWS)]
    assert len(lines) == len(ROWS)
    for line, row in zip(lines, ROWS, strict=True):
        numbers = line.removeprefix(row["name"]).split()
        assert numbers == [
            f"{row['images_per_s']:,.0f}",
            f"{row['mean_cost']:.3f}",
            f"{row['accuracy']:.2%}",
            f"{row['realised_ratio']:.2f}",
        ]
    assert "eefast demo --json bench/results/demo.json" in README


def test_first_screen_names_the_two_commands():
    first = "\n".join(README.splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first
