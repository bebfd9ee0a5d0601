"""Builds the CUDA kernels for the CPU: tests/simt/<name>.cpp, where every GPU thread is a fiber, by g++."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Fragments are reinterpreted between integer and half types, as on the GPU: no type-based alias analysis.
FLAGS = ("-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-shared", "-fPIC")


@functools.cache
def cuda_include() -> Path | None:
    """The folder with cuda_fp16.h; nvcc is asked where it looks, since it may be a link or a wrapper."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        folder = Path(os.environ.get(variable, "")) / "include"
        if os.environ.get(variable) and (folder / "cuda_fp16.h").exists():
            return folder
    if nvcc := shutil.which("nvcc"):
        with tempfile.NamedTemporaryFile(suffix=".cu") as source:
            plan = subprocess.run([nvcc, "--dryrun", "-c", source.name], capture_output=True, text=True).stderr
        for folder in re.findall(r'-I([^"\s]+)', plan):
            if (Path(folder) / "cuda_fp16.h").exists():
                return Path(folder)
    return None


def missing() -> str:
    """What prevents a build, as the reason of a skipped test; empty where it is possible."""
    if shutil.which("g++") is None:
        return "no g++ here, which builds the CUDA kernels for the CPU"
    if cuda_include() is None:
        return "no CUDA headers here (cuda_fp16.h); set CUDA_HOME or put nvcc on the PATH"
    return ""


@functools.cache
def build(name: str) -> ctypes.CDLL:
    """tests/simt/<name>.cpp as a loaded library; skips the test where a tool is missing.

    Raises `RuntimeError` with the compiler's words where it finds an error or warns.
    """
    if problem := missing():
        pytest.skip(problem, allow_module_level=True)
    with tempfile.TemporaryDirectory(prefix="eefast_simt_") as folder:
        library = Path(folder) / f"{name}.so"
        command = ["g++", *FLAGS, f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-isystem", str(cuda_include())]
        command += [str(ROOT / "tests" / "simt" / f"{name}.cpp"), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode or "warning:" in result.stderr:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        # The folder can be deleted: what is loaded stays.
        return ctypes.CDLL(str(library))
