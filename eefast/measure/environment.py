"""Where a measurement is made: machine, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..version import __version__


def inspect_environment() -> dict[str, Any]:
    """Machine, versions and commit, written beside every measurement."""
    return {
        "eefast": __version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cpp_kernels": ops.CPP_MISSING or "loaded",
    }


def _commit() -> str | None:
    """With a "+" where the code has changed since."""
    file = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie in an environment within the repository of something else.
        git("ls-files", "--error-unmatch", file.name)
        code = (f":(top){part}" for part in ("eefast", "csrc", "kernels", "bench/*.py"))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
