"""Programs under another release of Triton, with a stand-in for pip: what is installed, what is said if it is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import other_triton
import pytest

START = subprocess.run


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """What pip was called with, where it writes these modules, or fails with these words."""

    def replaced(modules: dict[str, str], error: str = "") -> list[list[str]]:
        calls = []

        def run(command: list[str], **options: Any) -> Any:
            if "pip" not in command:
                return START(command, **options)
            calls.append(command)
            folder = Path(command[command.index("--target") + 1])
            folder.mkdir(parents=True)
            for name, text in modules.items():
                (folder / f"{name}.py").write_text(text)
            return SimpleNamespace(returncode=int(bool(error)), stderr=f"WARNING: old\n{error}\n")

        monkeypatch.setattr(subprocess, "run", run)
        return calls

    return replaced


def test_installed_once_and_found_first(pip: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls = pip(dict.fromkeys(("torch", "triton"), "__version__ = '3.6.0 of old'"))
    program = "import sys, triton; print(triton.__version__, sys.argv[1:]); sys.exit(7)"
    for _ in range(2):
        arguments = ["--folder", str(tmp_path / "there"), "3.6.0", "-c", program, "--capability", "90"]
        assert other_triton.main(arguments) == 7
    assert capfd.readouterr().out.count("3.6.0 of old ['--capability', '90']") == 2
    (call,) = calls
    assert call[0] == sys.executable
    assert call[-2:] == ["triton==3.6.0", "torch==2.11.*"]


@pytest.mark.parametrize(("options", "code"), [([], 2), (["--skip"], 0)])
def test_what_cannot_be_had_is_said(
    pip: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], options: list[str], code: int
) -> None:
    pip({}, "ERROR: No matching distribution found for triton==0.0.1")
    assert other_triton.main([*options, "--folder", str(tmp_path / "there"), "0.0.1", "-c", "1 / 0"]) == code
    assert "skipped: Triton 0.0.1 cannot be had here: ERROR: No matching distribution" in capfd.readouterr().err


def test_a_pytorch_that_does_not_load_is_not_used(pip: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pip({"torch": "raise OSError('no libcudart.so.13')"})
    assert other_triton.main(["--folder", str(tmp_path / "there"), "3.6.0", "-c", "1 / 0"]) == 2
    assert "does not load with the libraries that are here: OSError: no libcudart.so.13" in capfd.readouterr().err
