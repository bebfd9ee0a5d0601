"""The joules that a device takes while something runs: by NVML's counter of a GPU, by RAPL's of a CPU's packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
NVML_MISSING = "NVML is missing: pip install nvidia-ml-py"


@dataclass(frozen=True)
class Counter:
    """A running total of energy. read: → joules; wraps_at: where it begins at 0 again, in joules, None: never."""

    read: Callable[[], float]
    wraps_at: float | None = None


@dataclass(frozen=True)
class Meter:
    """What counts a device's energy, all of it: other users of the device, and what it takes at rest, are in it.

    counters: one per GPU or CPU package; empty where none can be read, and `source` says why, else what counts.
    """

    counters: Sequence[Counter]
    source: str

    def measure(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        """What `run` returns, and the joules taken meanwhile; None without a counter.

        A counter may wrap around once meanwhile. NVML's moves every tenth of a second or so, RAPL's every millisecond:
        `run` is to take many times as long, and to wait for the device before it returns.
        """
        before = [counter.read() for counter in self.counters]
        result = run()
        after = [counter.read() for counter in self.counters]
        return result, sum(map(_taken, self.counters, before, after)) if self.counters else None


def _taken(counter: Counter, before: float, after: float) -> float:
    return after - before + (counter.wraps_at if counter.wraps_at is not None and after < before else 0.0)


@cache
def meter(device: str) -> Meter:
    """Of PyTorch's current GPU, "cuda", or of all CPU packages, "cpu"."""
    return nvml() if device == "cuda" else rapl(POWERCAP)


def nvml() -> Meter:
    try:
        import pynvml
    except ImportError:
        return Meter((), NVML_MISSING)
    try:
        pynvml.nvmlInit()
        # PyTorch's numbers follow CUDA_VISIBLE_DEVICES, NVML's do not.
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError) as error:
        return Meter((), f"NVML counts no energy here: {error}")
    # In millijoules, since the driver was loaded.
    return Meter((Counter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3),), "NVML, the whole GPU")


def rapl(folder: Path) -> Meter:
    """folder: of Linux' power capping framework; only whole packages count, not the cores and memory within them."""
    zones = sorted(folder.glob("intel-rapl:[0-9]*"))
    packages = [zone for zone in zones if zone.name.count(":") == 1 and _name(zone).startswith("package")]
    if not packages:
        return Meter((), f"RAPL is missing: no package in {folder}")
    try:
        counters = [Counter(_reader(zone), _joules(zone / "max_energy_range_uj")) for zone in packages]
        for counter in counters:
            counter.read()
    except (OSError, ValueError) as error:
        return Meter((), f"RAPL cannot be read: {error}; only root may, by default")
    return Meter(tuple(counters), f"RAPL, {len(counters)} whole package{'s' * (len(counters) > 1)}")


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text()
    except OSError:
        return ""


def _reader(zone: Path) -> Callable[[], float]:
    return lambda: _joules(zone / "energy_uj")


def _joules(file: Path) -> float:
    return int(file.read_text()) / 1e6
