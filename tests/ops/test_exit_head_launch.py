"""What csrc/cuda/exit_head.cu asks of the CUDA runtime, by g++ and a runtime that notes its calls."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
from simt_build import FLAGS, ROOT, cuda_include, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "everything is here")


class Noted(ctypes.Structure):
    _fields_ = (("shared_limit", ctypes.c_longlong), ("cleared", ctypes.c_longlong), ("shared", ctypes.c_longlong))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("launch")
    source = (ROOT / "csrc/cuda/exit_head.cu").read_text()
    source, launches = re.subn(r"(\w+)<<<\w+, [\w:]+, (\w+), \w+>>>\(", r"noted_launch(\1, \2, ", source)
    assert launches == 1
    source = re.sub(r"__global__ void __launch_bounds__\(.*\)\n", "void\n", source)
    source = source.replace("__grid_constant__ ", "").replace("extern __shared__ __align__(16)", "static")
    source = source.replace("char shared[];", "char shared[1];")
    (folder / "launcher.h").write_text(source)
    command = [
        "g++",
        *FLAGS,
        "-O0",
        "-w",
        "-Wl,-Bsymbolic",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests'}",
        "-isystem",
        str(cuda_include()),
    ]
    command += [f'-DLAUNCHER="{folder / "launcher.h"}"', str(ROOT / "tests/simt/exit_head_launch.cpp")]
    subprocess.run([*command, "-o", str(folder / "launch.so")], check=True)
    loaded = ctypes.CDLL(str(Path(folder / "launch.so")))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


def noted(library: ctypes.CDLL, size: int, classes: int) -> Noted:
    found, head = Noted(), library.head
    head.restype = ctypes.c_void_p
    assert library.launch(ctypes.c_void_p(head(size, classes)), ctypes.byref(found)) is None
    return found


@pytest.mark.parametrize("size", [0, 1, 31, 257])
def test_the_whole_workspace_is_cleared(library: ctypes.CDLL, size: int) -> None:
    """Four words, then a byte for each of `size` entries, read 32 at a time."""
    assert noted(library, size, 10).cleared == 4 * (4 + 8 * ((size + 31) // 32))


def test_the_limit_of_shared_memory_is_the_same_for_all_launches(library: ctypes.CDLL) -> None:
    """One thread's launch must not lower it under another's."""
    found = noted(library, 9, 3000)
    assert found.shared > 48 * 1024
    assert found.shared_limit == 200 * 1024
    assert noted(library, 9, 10).shared_limit == 0
