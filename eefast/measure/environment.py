"""What a measurement says about one way to run a network, and where it was made."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..version import __version__


@dataclass(frozen=True)
class Row:
    """One way to run a network, measured.

    images_per_s: median over rounds; images_per_s_quantiles: 20 % and 80 %.
    mean_cost: of the exits taken, 1 = the plain network.
    accuracy: 0 … 1.
    realised_ratio: median over rounds of mean cost × time of the plain network ÷ time of this row, paired in one run.
    images: how many distinct images the row answered; batch_size: in batches of how many.
    exits: how many images left at each exit.
    flips: images whose exit differs from the one-by-one answer, all of them closer to the threshold than `flip_margin`.
    speedup: median over rounds of time of the plain network ÷ time of this row; speedup_quantiles: 20 % and 80 %.
    """

    name: str
    images_per_s: float
    images_per_s_quantiles: tuple[float, float]
    mean_cost: float
    accuracy: float
    realised_ratio: float
    images: int
    batch_size: int
    criterion: str | None
    exits: tuple[int, ...]
    flips: int
    flip_margin: float
    speedup: float
    speedup_quantiles: tuple[float, float]


def environment() -> dict[str, Any]:
    """Machine, versions and commit, as they stand beside every measurement."""
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
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
