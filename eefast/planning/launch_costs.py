"""What a device takes besides the kernels: device → seconds of a launch and a wait, measured once and kept on disk."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..system import files

REPEATS = 50

BUSY_CYCLES = 100_000
"""Of the device's clock, about 50 µs: several times what the host takes to queue a graph."""


@dataclass(frozen=True)
class LaunchCosts:
    """Seconds.

    launch: of the host to queue a CUDA graph.
    wait: from the end of a graph until the next one begins, which the host queues after reading a count from it.
    """

    launch: float
    wait: float


def load(device: torch.device) -> LaunchCosts:
    """From the disk, or measured now, which takes a second, and kept there; a read-only folder is no error."""
    try:
        seconds = json.loads(path(device).read_text())["seconds"]
        found = LaunchCosts(**{name: float(value) for name, value in seconds.items()})
        if 0 <= found.launch < math.inf and 0 <= found.wait < math.inf:
            return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    costs = measure(device)
    with suppress(OSError):
        keep(costs, device)
    return costs


def calibrate(device: torch.device) -> LaunchCosts:
    """Measure and keep on disk what `load` reads.

    Raises `ValueError` for a device that is no CUDA device, since only there something besides kernels counts, and
    `OSError` where the folder cannot be written to.
    """
    if device.type != "cuda":
        raise ValueError(f"device={str(device)!r} needs no calibration; choose a CUDA device")
    costs = measure(device)
    keep(costs, device)
    return costs


def keep(costs: LaunchCosts, device: torch.device) -> None:
    file = path(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, json.dumps({"device": file.stem, "seconds": asdict(costs)}, indent=2) + "\n")


def path(device: torch.device) -> Path:
    """Where the costs of a device are kept: one file for each kind of GPU, PyTorch and CUDA version."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{torch.cuda.get_device_name(device)} torch {torch.__version__} cuda {torch.version.cuda}"
    return cache / "eefast" / "devices" / f"{name.replace('/', '-').replace(' ', '_')}.json"


def measure(device: torch.device) -> LaunchCosts:
    """With a graph of one small kernel that writes a count to pinned memory: many in a row, then each waited for."""
    with torch.cuda.device(device), torch.inference_mode(False):
        count = torch.zeros(1, dtype=torch.int32, device=device)
        pinned = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        work, passed = torch.zeros(1 << 22, device=device), torch.cuda.Event()
        stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for step in range(2):
                if step:
                    graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(4):
                    work.add_(1)
                count.add_(1)
                pinned.copy_(count, non_blocking=True)
            graph.capture_end()
        torch.cuda.synchronize(device)

        def in_a_row() -> float:
            begin = time.perf_counter()
            for _ in range(REPEATS):
                graph.replay()
            queued = time.perf_counter()
            torch.cuda.synchronize(device)
            launches.append((queued - begin) / REPEATS)
            return (time.perf_counter() - begin) / REPEATS

        def waited_for() -> float:
            begin = time.perf_counter()
            for _ in range(REPEATS):
                graph.replay()
                passed.record()
                passed.synchronize()
                int(pinned)
            return (time.perf_counter() - begin) / REPEATS

        launches: list[float] = []
        rows = [(in_a_row(), waited_for()) for _ in range(5)]
        wait = statistics.median(waited - row for row, waited in rows[1:])
    return LaunchCosts(launch=statistics.median(launches[1:]), wait=max(wait, 0.0))


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """What the device takes for `work`, between two events around it.

    The device is kept busy until all is queued: on an idle one the first event would pass at once, and the time of the
    host, which queues the work, would be in it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        work()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3
