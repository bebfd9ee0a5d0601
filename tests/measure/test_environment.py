"""Where a measurement is made: what is known of it, also without git and without Linux's /proc."""

import json
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import eefast
from eefast import ops
from eefast.measure import environment
from eefast.measure.environment import inspect_environment


def test_machine_versions_and_threads_are_recorded():
    found = inspect_environment()
    assert json.loads(json.dumps(found)) == found
    assert (found["eefast"], found["torch"]) == (eefast.__version__, torch.__version__)
    assert (found["python"], found["threads"]) == (platform.python_version(), torch.get_num_threads())
    assert found["commit"] is None or re.fullmatch(r"[0-9a-f]{7,40}\+?", found["commit"])
    assert found["processor"]


@pytest.mark.parametrize(("missing", "said"), [(None, "loaded"), ("not built", "not built")])
def test_it_says_whether_the_kernels_are_loaded(monkeypatch, missing, said):
    monkeypatch.setattr(ops, "CPP_MISSING", missing)
    assert inspect_environment()["cpp_kernels"] == said


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")], ids=repr)
def test_outside_a_repository_no_commit_is_known(monkeypatch, error):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert inspect_environment()["commit"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_repository_around_the_package_is_not_its_own(monkeypatch, tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    installed = tmp_path / "venv" / "eefast" / "environment.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "of something else")
    monkeypatch.setattr(environment, "__file__", str(installed))
    assert inspect_environment()["commit"] is None
    git("add", ".")
    git("commit", "-q", "-m", "with the package")
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=tmp_path, text=True).strip()
    assert inspect_environment()["commit"] == head
    (tmp_path / "eefast").mkdir()
    code = tmp_path / "eefast" / "heads.py"
    code.touch()
    assert inspect_environment()["commit"] == head
    git("add", ".")
    assert inspect_environment()["commit"] == f"{head}+"


@pytest.mark.parametrize(
    ("text", "platform_says", "expected"),
    [
        ("processor : 0\nmodel name : A CPU @ 2 GHz: fast\nmodel name : B\n", "x", "A CPU @ 2 GHz: fast"),
        ("processor : 0\n", "x", "machine"),
        (None, "an arm", "an arm"),
        (None, "", "machine"),
    ],
    ids=["named", "without a name", "no file", "no file and no name"],
)
def test_the_processor_has_a_name(monkeypatch, text, platform_says, expected):
    def read_text(path):
        if text is None:
            raise FileNotFoundError(path)
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: platform_says)
    monkeypatch.setattr(platform, "machine", lambda: "machine")
    assert inspect_environment()["processor"] == expected
