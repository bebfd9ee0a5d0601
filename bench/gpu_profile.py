"""A way of a GPU on a few batches → its kernels by PyTorch's profiler: how often, how long, the gaps between them.

A line of JSON for each network; the trace of each, which chrome://tracing and Perfetto show, goes to the folder $OUT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_ways
import torch
from gpu_ways import TRACED_BATCHES
from launch_gaps import covered
from rows import first_line
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from workloads import KEY_COMPACT_ON_GPU, RESIDENT_ON_GPU, Workload

PROFILED: tuple[tuple[Workload, str], ...] = (
    (KEY_COMPACT_ON_GPU[0], "eefast compact"),
    (RESIDENT_ON_GPU[1], "eefast resident, streaming"),
    (KEY_COMPACT_ON_GPU[0], "plain, eager, CUDA graph"),
)
"""Workload and the name of one of its ways."""

MOST_KERNELS, MOST_GAPS = 16, 5
KERNELS = DeviceType.CUDA
"""What of a trace runs on the device."""

Kernel = tuple[str, float, float]
"""Name, begin and end in microseconds."""


def summary(kernels: Iterable[Kernel], batches: int) -> dict[str, Any]:
    """Per batch: microseconds from the first kernel to the last, and in which one runs; each kernel's calls and
    microseconds, those that take longest first. gaps: the longest times in which nothing runs, microseconds.
    """
    found = sorted(kernels, key=lambda kernel: kernel[1:])
    if not found:
        return {"kernels": []}
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    gaps, reached = [], found[0][1]
    for name, begin, end in found:
        totals[name][0] += 1
        totals[name][1] += end - begin
        gaps.append(max(0.0, begin - reached))
        reached = max(reached, end)
    slowest = sorted(totals.items(), key=lambda total: -total[1][1])
    return {
        "microseconds": round((reached - found[0][1]) / batches, 1),
        "busy": round(covered((begin, end) for _, begin, end in found) / batches, 1),
        "gaps": [round(gap, 1) for gap in sorted(gaps, reverse=True)[:MOST_GAPS] if gap],
        "launches": len(found) / batches,
        "kernels": [[name, n / batches, round(spent / batches, 1)] for name, (n, spent) in slowest[:MOST_KERNELS]],
    }


def profiled(run: Callable[[], Any], trace: Path | None) -> list[Kernel]:
    """The kernels of `run`, whose trace goes to a file."""
    activities = torch.profiler.ProfilerActivity
    wanted = [activities.CPU, activities.CUDA] if torch.cuda.is_available() else [activities.CPU]
    with torch.profiler.profile(activities=wanted) as profile:
        run()
        torch.cuda.synchronize()
    if trace is not None:
        profile.export_chrome_trace(str(trace))
    events = [e for e in profile.events() or () if e.device_type == KERNELS and not e.is_user_annotation]
    return [(e.name, e.time_range.start, e.time_range.end) for e in events]


@torch.no_grad()
def profile_of(work: Workload, name: str, trace: Path | None) -> dict[str, Any]:
    case = gpu_ways.case_of(work, gpu_ways.subject(work.network, work.batch_size))
    (way,) = (way for way in gpu_ways.ways(work, case) if way.name == name)
    batches = [case.batches[i % len(case.batches)] for i in range(TRACED_BATCHES)]
    run = partial(way.run, batches)
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    found = {"unprofiled microseconds": round(1e6 * seconds / TRACED_BATCHES, 1)}
    return found | summary(profiled(run, trace), TRACED_BATCHES)


def profiles(wanted: Sequence[tuple[Workload, str]], folder: Path | None) -> bool:
    """Whether all could be made; one that fails says so in its line."""
    good = True
    for number, (work, name) in enumerate(wanted):
        found: dict[str, Any] = {"profile": str(work), "way": name}
        try:
            found |= profile_of(work, name, folder and folder / f"trace-{number}.json.gz")
        except Exception as error:  # whatever a GPU or its profiler finds
            good = False
            traceback.print_exc()
            found["failed"] = first_line(error)
        print(json.dumps(found), flush=True)
    return good


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    folder = os.environ.get("OUT")
    return 0 if profiles(PROFILED, Path(folder) if folder else None) else 1


if __name__ == "__main__":
    sys.exit(main())
