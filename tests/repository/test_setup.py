"""setup.py without a working C++ compiler: a pure wheel and a warning, or an error where the kernels are wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "eefast_command.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("eefast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


def setup(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name not in ("EEFAST_USE_CPP", "CXX")}
    variables |= {"EEFAST_USE_CUDA": "0", **environment}
    arguments = [sys.executable, "setup.py", "--quiet", *command]
    return subprocess.run(arguments, cwd=checkout, env=variables, capture_output=True, text=True)


def test_a_broken_compiler_builds_the_wheel_without_cpp(checkout: Path, tmp_path: Path) -> None:
    result = setup(checkout, "bdist_wheel", "--dist-dir", str(tmp_path), CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "warning: /bin/false does not compile C++20: no message; installing without the C++" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "eefast/ops/library.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_broken_compiler_is_an_error_where_cpp_is_wanted(checkout: Path) -> None:
    result = setup(checkout, "build_ext", "--inplace", CXX="/bin/false", EEFAST_USE_CPP="1")
    assert result.returncode != 0
    assert result.stderr.strip() == (
        "eefast: EEFAST_USE_CPP=1, but /bin/false does not compile C++20: no message; set CXX to a C++20 compiler"
    )


def test_switched_off_no_compiler_is_started(checkout: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    compiler.chmod(0o755)
    result = setup(checkout, "build_ext", "--inplace", CXX=str(compiler), EEFAST_USE_CPP="0")
    assert result.returncode == 0, result.stderr
    assert "warning: EEFAST_USE_CPP=0; installing without the C++ kernels" in result.stderr
    assert not (tmp_path / "started").exists()
    assert not list((checkout / "eefast").glob("*.so"))
