"""What csrc/cuda/exit_head.cu and resident.cu ask of the CUDA runtime, by g++ and a runtime that notes its calls."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
from simt_build import FLAGS, ROOT, cuda_include, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "everything is here")

OPT_IN, PROCESSORS = 200 * 1024, 132


class Noted(ctypes.Structure):
    """As in tests/simt/launch.cpp; asked: questions about the device or the kernel. Of several launches the last one's
    shared memory and grid, and the most shared memory of any.
    """

    names = ("shared_limit", "cleared", "shared", "grid", "asked", "launches", "most_shared")
    _fields_ = tuple((name, ctypes.c_longlong) for name in names)


def built(folder: Path, name: str) -> ctypes.CDLL:
    source = (ROOT / f"csrc/cuda/{name}.cu").read_text()
    source, launches = re.subn(r"(\w+)<<<(\w+), [\w:]+, (\w+), \w+>>>\(", r"noted_launch(\1, \2, \3, ", source)
    assert launches == 1
    source = re.sub(r"__global__ void __launch_bounds__\(.*?\)\s(?=\s*\w+\()", "void ", source)
    source = source.replace("__grid_constant__ ", "")
    source = re.sub(r"extern __shared__ __align__\(\d+\) char shared\[\];", "static char shared[1];", source)
    (folder / "launcher.h").write_text(source)
    command = ["g++", *FLAGS, "-O0", "-w", "-Wl,-Bsymbolic", f"-D{name.upper()}", f'-DLAUNCHER="{folder}/launcher.h"']
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-isystem", str(cuda_include())]
    subprocess.run([*command, str(ROOT / "tests/simt/launch.cpp"), "-o", str(folder / "launch.so")], check=True)
    loaded = ctypes.CDLL(str(folder / "launch.so"))
    loaded.launch.restype = ctypes.c_char_p
    return loaded


def noted(library: ctypes.CDLL, *arguments: int) -> Noted:
    found = Noted()
    assert library.launch(*arguments, ctypes.byref(found)) is None
    return found


@pytest.fixture(scope="module")
def exit_head(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("exit_head"), "exit_head")


@pytest.fixture(scope="module")
def resident(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return built(tmp_path_factory.mktemp("resident"), "resident")


@pytest.mark.parametrize("size", [0, 1, 31, 257])
def test_the_exit_head_clears_its_whole_workspace(exit_head: ctypes.CDLL, size: int) -> None:
    """Four words, then a byte for each of `size` entries, read 32 at a time."""
    assert noted(exit_head, size, 10).cleared == 4 * (4 + 8 * ((size + 31) // 32))


@pytest.mark.parametrize(("classes", "launches"), [(1, 1), (63, 1), (64, 3), (8191, 3)])
def test_the_exit_head_needs_no_more_shared_memory_than_every_device_has(
    exit_head: ctypes.CDLL, classes: int, launches: int
) -> None:
    """So it asks for none, which another thread's launch might lower again."""
    found = noted(exit_head, 256, classes)
    assert found.launches == launches
    assert 0 < found.most_shared <= 48 * 1024
    assert found.shared_limit == 0


def test_many_blocks_for_many_classes(exit_head: ctypes.CDLL) -> None:
    """The last launch decides, one warp for each sample."""
    assert noted(exit_head, 257, 1000).grid == 33
    assert noted(exit_head, 10**6, 1000).grid == 8 * PROCESSORS


def test_the_device_is_asked_once_for_each_resident_kernel(resident: ctypes.CDLL) -> None:
    for maps, bfloat16 in ((50_000, 0), (90_000, 0), (90_000, 1)):
        for number, images in enumerate((4096, 4096, 3, 4096)):
            found = noted(resident, images, maps, bfloat16)
            assert found.asked == (4 if number == 0 else 0)
            assert found.grid == min(images, PROCESSORS * (OPT_IN // found.shared))
            assert found.shared > maps
            assert found.cleared == 4
