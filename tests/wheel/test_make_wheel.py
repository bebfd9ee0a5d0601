"""What `make wheel` refuses: no kernels where they are wanted, missing folders, torch's C++ interface."""

import subprocess
import zipfile
from contextlib import nullcontext
from types import SimpleNamespace

import make_wheel
import pytest

import eefast
from eefast import ops

BINARY, NONE = "eefast-0-cp310-abi3-linux_x86_64.whl", "eefast-0-py3-none-any.whl"


def names():
    """What belongs into a wheel without kernels."""
    root = make_wheel.ROOT
    kernels = [f"eefast/{path.relative_to(root).as_posix()}" for path in (root / "kernels").rglob("*.py")]
    package = [path.relative_to(root).as_posix() for path in (root / "eefast").rglob("*.py")]
    return [*kernels, *package, "eefast_command.py", "eefast-0.dist-info/WHEEL"]


def made(folder, name, content):
    with zipfile.ZipFile(folder / name, "w") as file:
        for entry in content:
            file.writestr(entry, b"")
    return folder / name


def test_whole_wheels_pass(tmp_path):
    make_wheel.check_names(made(tmp_path, NONE, names()), pure=True)
    make_wheel.check_names(made(tmp_path, BINARY, [*names(), make_wheel.LIBRARY]), pure=False)


@pytest.mark.parametrize(
    ("name", "change", "pure", "words"),
    [
        (NONE, lambda n: n, False, r"has the kernels \[\]; add --pure"),
        (BINARY, lambda n: [*n, make_wheel.LIBRARY], True, "--pure asks for one without"),
        (BINARY, lambda n: n, False, r"has the kernels \[\]"),
        (BINARY.replace("abi3", "cp310"), lambda n: [*n, make_wheel.LIBRARY], False, "is for one Python only"),
        (NONE, lambda n: [e for e in n if "exporting" not in e], True, r"lacks eefast/exporting/__init__\.py"),
        (NONE, lambda n: [*n, "tests/conftest.py"], True, "also has tests"),
    ],
    ids=["no kernels", "kernels", "no library", "one Python", "a folder", "tests"],
)
def test_others_are_refused(tmp_path, name, change, pure, words):
    with pytest.raises(SystemExit, match=words):
        make_wheel.check_names(made(tmp_path, name, change(names())), pure)


@pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")
def test_the_library_uses_the_stable_interface_only(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / BINARY, "w") as file:
        file.write(next(make_wheel.Path(eefast.__file__).parent.glob("_C*.so")), make_wheel.LIBRARY)
    make_wheel.check_symbols(tmp_path / BINARY)
    assert int(capsys.readouterr().out.split()[0]) > 10


def test_another_interface_is_noticed(tmp_path, monkeypatch):
    listed = "         U _ZN2at5emptyEv\n         U aoti_torch_empty\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, listed, ""))
    with pytest.raises(SystemExit, match="needs _ZN2at5emptyEv, which are not of torch's stable interface"):
        make_wheel.check_symbols(made(tmp_path, BINARY, [make_wheel.LIBRARY]))


@pytest.mark.parametrize("code", [0, 1])
def test_new_environments_see_no_packages_of_this_one(tmp_path, monkeypatch, code):
    monkeypatch.setenv("PYTHONPATH", "of this one")
    started = []

    def run(words, env, **_):
        started.append(env)
        return subprocess.CompletedProcess(words, code if "pytest" in words and "install" not in words else 0)

    monkeypatch.setattr(subprocess, "run", run)
    options = SimpleNamespace(torch="torch", pure=False)
    with nullcontext() if code == 0 else pytest.raises(SystemExit, match=r"fails its tests on Python 3\.10"):
        make_wheel.install_and_test(tmp_path / BINARY, "3.10", tmp_path / "python", options)
    assert len(started) == 3
    assert not any("PYTHONPATH" in env for env in started)
