"""The example of an edge device and a server, run as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "edge_server.py"


@pytest.mark.slow
@pytest.mark.parametrize("features", ["uint8", "exact"])
def test_edge_and_server_answer_all_images(features: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, features], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pattern = r"(\d+) of 1024 bytes sent per image, cost at the edge (0\.\d+), accuracy (0\.\d+)\n"
    found = re.fullmatch(pattern, done.stdout)
    assert found, done.stdout
    sent, cost, accuracy = map(float, found.groups())
    assert 50 < sent < (600 if features == "uint8" else 2200)
    assert 0.43 <= cost < 0.719
    assert accuracy > 0.7


def test_it_is_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 60
