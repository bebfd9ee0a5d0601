"""The environment with another torch: where it cannot be made, that is said and nothing is left behind."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import second_torch


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty repository, disk enough, and pip that does what `answers` say."""
    monkeypatch.setattr(second_torch, "ROOT", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=9e9))
    monkeypatch.setattr(sys, "argv", ["second_torch.py", "--torch", "2.11.0"])
    return tmp_path


def test_the_default_is_the_oldest_torch_that_the_package_supports():
    assert second_torch.oldest() == "2.11.0"


def test_too_little_disk_is_said_before_anything_is_made(root, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7.4e9))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert second_torch.main() == 0
    assert capsys.readouterr().out == ("torch 2.11.0 was not tested: its environment needs 8 GB of disk, 7 are free\n")


def test_packages_that_cannot_be_had_are_said(root, monkeypatch, capsys):
    def run(words, **_):
        (root / "build/torch-2.11.0/bin").mkdir(parents=True, exist_ok=True)
        return subprocess.CompletedProcess(words, int("pip" in words), "", "looking\nERROR: no torch==2.11.0\n")

    monkeypatch.setattr(subprocess, "run", run)
    assert second_torch.main() == 0
    assert "not tested: its packages cannot be had: ERROR: no torch==2.11.0\n" in capsys.readouterr().out
    assert not (root / "build/torch-2.11.0").exists()


@pytest.mark.parametrize(("words", "chosen"), [([], "tests/network"), (["tests/zoo", "-x"], "tests/zoo")])
def test_the_tests_are_those_named_or_a_stated_selection(root, monkeypatch, capsys, words, chosen):
    for name in ("network", "cli"):
        (root / "tests" / name).mkdir(parents=True)
        (root / "tests" / name / "test_it.py").touch()
    (root / "build/torch-2.11.0").mkdir(parents=True)
    (root / "build/torch-2.11.0/.ready").touch()
    started = []

    def run(words, **_):
        started.append(list(map(str, words)))
        return subprocess.CompletedProcess(words, 3, "2.11.0 with kernels\n", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(second_torch, "said", lambda words: "2.11.0 with kernels")
    sys.argv += words
    assert second_torch.main() == 3, "the exit code of the tests"
    (command,) = started
    assert command[1:4] == ["-m", "pytest", "-q"]
    assert chosen in command
    assert ("tests/network" in command) == (not words)
    out = capsys.readouterr().out
    assert ("not run here: tests/cli\n" in out) == (not words)
