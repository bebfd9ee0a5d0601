"""Hostile files: `eefast.load` runs nothing of them, keeps its limits of time and memory, and raises one error."""

import itertools
import os
import random
import socket
from dataclasses import dataclass
from pathlib import Path

import pytest
from hostile_files import KINDS, File, Loader, Outcome, attempt, files

from eefast.checkpoint.loading import CheckpointError, load

SEED = int(os.environ.get("EEFAST_HOSTILE_SEED", "0"))
EACH = int(os.environ.get("EEFAST_HOSTILE_FILES", "2"))
"""Files of every kind; `python tests/helpers/hostile_files.py` loads all of them."""


@pytest.fixture(scope="module")
def canary(tmp_path_factory):
    return tmp_path_factory.mktemp("hostile") / "canary"


@dataclass(frozen=True)
class Kind:
    """Files of a kind: how many there are, and those that are loaded; all of them would take a gigabyte of memory."""

    number: int
    chosen: list[File]


@pytest.fixture(scope="module")
def made(canary):
    found = {}
    for kind, group in itertools.groupby(files(SEED, canary), key=lambda file: file.kind):
        all_of_them = list(group)
        chosen = all_of_them if kind == "control" else random.Random(SEED).sample(all_of_them, EACH)
        found[kind] = Kind(len(all_of_them), chosen)
    return found


@pytest.fixture(scope="module")
def loader(canary, made):
    loader = Loader(canary)
    # What the first load of a kind imports is no file's fault.
    for file in made["control"].chosen:
        attempt(loader, file)
    yield loader
    loader.close()


def test_the_generator_makes_enough(made):
    assert made.keys() == {"control", *KINDS}
    assert len(made) > 15
    assert sum(kind.number for kind in made.values()) >= 150


@pytest.mark.parametrize("kind", ["control", *KINDS])
def test_no_file_takes_more_than_it_may(loader, made, kind):
    for file in made[kind].chosen:
        outcome = attempt(loader, file)
        assert outcome.faults(file.loads) == [], f"{file.kind}: {file.label}"


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (Outcome("RecursionError", "deep", 0, 0, 0), "left as RecursionError: deep"),
        (Outcome("", "", 3.1, 0, 10**8), "took 3.1 s"),
        (Outcome("CheckpointError", "", 0, 6.1e8, 10**8), "took 610 MB for 100.0 MB"),
        (Outcome("CheckpointError", "", 0, 0, 0, executed=True), "executed code"),
    ],
)
def test_what_breaks_the_rule_shows(outcome, fault):
    assert outcome.faults(loads=False) == [fault]


def test_a_process_that_ends_shows(loader, made):
    loader.process.kill()
    loader.process.wait()
    assert "ended process" in attempt(loader, made["control"].chosen[0]).error


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the check of the path and the opening, another process replaces the file."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\3\4")
    opened = os.open

    def exchange(name, flags, *more):
        if str(name) == str(path):
            path.unlink()
            os.mkfifo(path)
        return opened(name, flags, *more)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(CheckpointError, match="is a pipe; only a regular file is read"):
        load(path, input_shape=(1, 8, 8))


def test_a_refused_file_leaves_nothing_open(tmp_path):
    before = len([*Path("/proc/self/fd").iterdir()])
    (tmp_path / "half.pt").write_bytes(b"PK\3\4")
    os.mkfifo(tmp_path / "pipe.pt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket.pt"))
    for name in ("half.pt", "pipe.pt", "socket.pt"):
        with pytest.raises(CheckpointError):
            load(tmp_path / name)
    assert len([*Path("/proc/self/fd").iterdir()]) == before
