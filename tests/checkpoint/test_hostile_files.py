"""Hostile files: `eefast.load` runs nothing of them, keeps its limits of time and memory, and raises one error."""

import os
import random
from dataclasses import dataclass
from functools import cache

import pytest
from hostile_files import KINDS, File, Loader, Outcome, attempt, files

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
    """Kind → its files, made when they are asked for."""

    @cache
    def made_of(kind):
        found = list(files(kind, SEED, canary))
        return Kind(len(found), found if kind == "control" else random.Random(SEED).sample(found, EACH))

    return made_of


@pytest.fixture(scope="module")
def loader(canary, made):
    loader = Loader(canary)
    # What the first load of a kind imports is no file's fault.
    for file in made("control").chosen:
        attempt(loader, file)
    yield loader
    loader.close()


@pytest.mark.slow
def test_the_generator_makes_enough(made):
    assert len(KINDS) > 15
    assert sum(made(kind).number for kind in ("control", *KINDS)) >= 150


@pytest.mark.parametrize("kind", ["control", *KINDS])
@pytest.mark.sampled(6)
def test_no_file_takes_more_than_it_may(loader, made, kind):
    for file in made(kind).chosen:
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


@pytest.mark.slow
def test_a_process_that_ends_shows(loader, made):
    loader.process.kill()
    loader.process.wait()
    assert "ended process" in attempt(loader, made("control").chosen[0]).error
