"""Runs of `eefast score` in processes of their own, killed when a number of files are there, and resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def start(network: Path, source: Path, output: Path, *words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "eefast", "score", network, source, "--output", output, "--threads-per-worker", 1]
    return subprocess.Popen(
        [*map(str, command), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """What it printed."""
    out, error = process.communicate(timeout=300)
    assert process.returncode == code, error
    return out + error


def wait_for_files(output: Path, count: int, process: subprocess.Popen) -> None:
    while len(list(output.glob("part-*.parquet"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def children(process: subprocess.Popen) -> list[int]:
    """The worker processes, on Linux."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(number) for task in tasks for number in task.read_text().split()]


def has_ended(number: int) -> bool:
    """Also if it is a zombie that nobody has waited for."""
    for _ in range(1000):
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


def kill(number: int) -> None:
    os.kill(number, signal.SIGKILL)
