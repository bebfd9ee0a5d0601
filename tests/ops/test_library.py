"""How the C++ library is found, and made in a source checkout that was never built."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from eefast import ops
from eefast.ops import library


def checkout(folder: Path, setup: str) -> Path:
    package = folder / "eefast"
    for path in (package, folder / "csrc"):
        path.mkdir()
    (folder / "csrc" / "bind.cpp").touch()
    (folder / "setup.py").write_text(f"import sys, pathlib\n{setup}\n")
    return package


def test_a_checkout_is_built_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = checkout(tmp_path, "assert sys.argv[2:] == ['build_ext', '--inplace']; open('eefast/_C.so', 'w')")
    with caplog.at_level(logging.WARNING, "eefast"):
        assert library._built_in_place(package) == [package / "_C.so"]
    assert "compiling the C++ kernels" in caplog.text
    assert sorted(path.name for path in package.iterdir()) == ["_C.so"]


def test_a_build_that_fails_is_not_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = checkout(tmp_path, "open('tried', 'a').write('x'); sys.exit('no compiler today')")
    with caplog.at_level(logging.WARNING, "eefast"):
        assert library._built_in_place(package) == library._built_in_place(package) == []
    assert "no compiler today" in caplog.text
    assert (tmp_path / "tried").read_text() == "x"


def test_an_installed_package_builds_nothing(tmp_path: Path) -> None:
    package = tmp_path / "eefast"
    package.mkdir()
    assert library._built_in_place(package) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("opencl", r"EEFAST_EXIT_KERNELS='opencl' is unknown; set it to triton or cuda"), ("", "")],
)
def test_exit_kernels_by_name(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", name)
    if message:
        with pytest.raises(ValueError, match=message):
            ops.exit_kernels()
    else:
        assert ops.exit_kernels() in ("triton", "cuda", "")


@pytest.mark.skipif(ops.CUDA_MISSING is not None, reason=f"CUDA kernels: {ops.CUDA_MISSING}")
def test_the_library_has_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EEFAST_EXIT_KERNELS", "cuda")
    assert ops.exit_kernels() == "cuda"
