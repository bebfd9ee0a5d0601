"""The C++ kernels, cross-compiled for aarch64 and run under qemu: their answers beside those of this processor.

Needs a cross compiler and qemu-user, on Debian `apt install g++-aarch64-linux-gnu qemu-user`; no torch.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    *("cpu/exit_head", "cpu/instruction_set", "cpu/resident", "cpu/resident_kernels", "cpu/resident_int8_kernels"),
    "program",
)
CROSS, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ALLOWED = 1e-6
"""Largest difference ÷ largest number: aarch64 rounds a product and a sum once, the portable x86 kernels twice."""


def build(compiler: str, folder: Path) -> Path:
    """The program of `tests/tsan/engines.cpp`, which runs every kernel; with the portable vectors only."""
    folder.mkdir(parents=True, exist_ok=True)
    objects = []
    for path in (ROOT / "tests" / "tsan" / "engines.cpp", *(ROOT / "csrc" / f"{name}.cpp" for name in SOURCES)):
        objects.append(str(folder / f"{path.stem}.o"))
        flags = ["-std=c++20", "-O2", "-DEEFAST_SANITIZED", "-DEEFAST_PORTABLE", f"-I{ROOT / 'csrc'}"]
        if path.stem == "engines":
            # Its weights in INT8 are the bytes of random floats, which must be the same to the last bit.
            flags.append("-ffp-contract=off")
        subprocess.run([*compiler.split(), *flags, "-c", str(path), "-o", objects[-1]], check=True)
    program = folder / "engines"
    # Statically, so that the emulator needs no libraries of aarch64.
    subprocess.run([*compiler.split(), *objects, "-static", "-pthread", "-o", str(program)], check=True)
    return program


def answers(command: list[str], path: Path) -> np.ndarray:
    done = subprocess.run([*command, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
    return np.fromfile(path, np.float32)


def main() -> int:
    missing = [name for name in (CROSS, EMULATOR) if shutil.which(name) is None]
    if missing:
        print(f"{' and '.join(missing)} not installed: apt install g++-aarch64-linux-gnu qemu-user", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="eefast_aarch64_") as name:
        folder = Path(name)
        there = answers([EMULATOR, str(build(CROSS, folder / "aarch64"))], folder / "there")
        here = answers([str(build(os.environ.get("CXX", "c++"), folder / "here"))], folder / "here.numbers")
    if here.shape != there.shape or not np.isfinite(here).all() or np.ptp(here) == 0:
        print(f"{there.shape} numbers on aarch64, {here.shape} here, of which all must be finite")
        return 1
    difference = float(np.abs(here - there).max() / np.abs(here).max())
    print(f"{len(here):,} numbers on aarch64 and here differ by {difference:.1e} of the largest at most")
    return int(difference > ALLOWED)


if __name__ == "__main__":
    sys.exit(main())
