"""A release of Triton and a Python program → the program run with it, and with the oldest PyTorch that eefast supports.

Both are installed once, without what they require, into build/triton-<release>; all else comes from the environment
that this script runs in. The machine with a GPU may have such an older pair: what is compiled and loaded here with the
newest proves nothing about it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOADS = "import torch, triton; print(torch.__version__, triton.__version__)"


class CannotBeHad(Exception):
    """Why the packages are not there."""


def oldest_torch(project: str) -> str:
    """The release of PyTorch that pyproject.toml asks for at least, as pip takes it: "2.11.*"."""
    (release,) = re.findall(r'^dependencies = .*"torch>=([\d.]+)"', project, re.MULTILINE)
    return f"{release}.*"


def installed(release: str, folder: Path) -> Path:
    """The folder with both packages, for PYTHONPATH; raises `CannotBeHad`."""
    ready = folder / ".ready"
    if not ready.exists():
        torch = oldest_torch((ROOT / "pyproject.toml").read_text())
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder)]
        done = subprocess.run([*pip, f"triton=={release}", f"torch=={torch}"], capture_output=True, text=True)
        if done.returncode:
            raise CannotBeHad(last_line(done.stderr))
        loads = subprocess.run([sys.executable, "-c", LOADS], env=environment(folder), capture_output=True, text=True)
        if loads.returncode:
            why = f"PyTorch {torch} does not load with the libraries that are here"
            raise CannotBeHad(f"{why}: {last_line(loads.stderr)}")
        ready.write_text(loads.stdout)
    return folder


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="of Triton, such as 3.6.0")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="with its arguments, or `-m module`")
    parser.add_argument("--skip", action="store_true", help="exit code 0, not 2, where the packages cannot be had")
    parser.add_argument("--folder", type=Path, help="where they are installed; default build/triton-<release>")
    asked = parser.parse_args(arguments)
    folder = asked.folder or ROOT / "build" / f"triton-{asked.release}"
    try:
        installed(asked.release, folder)
    except CannotBeHad as why:
        print(f"skipped: Triton {asked.release} cannot be had here: {why}", file=sys.stderr)
        return 0 if asked.skip else 2
    print(f"with PyTorch and Triton {(folder / '.ready').read_text().strip()}:", flush=True)
    return subprocess.run([sys.executable, *asked.program], env=environment(folder)).returncode


if __name__ == "__main__":
    sys.exit(main())
