"""Whole networks in batches: thresholds for a stated mix of exits, answers checked, then all ways timed in turns.

The CPU's ways run in separate processes, see cpu_ways.py; a GPU's in this one, see gpu_ways.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import cpu_ways
import torch
from command import add_device_option, chosen_device, conclude
from gpu_ways import GpuWays
from network_runs import Device, run
from peers import ALL_PEERS, INT8_PEERS, KEY_PEERS
from rows import environment
from workloads import ALL_ON_CPU, INT8_ON_CPU, KEY_ON_CPU, ON_GPU, Workload


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='what has this in its name, such as "eenet20, batch 256"'
    )
    parser.add_argument(
        "--quick", action="store_true", help="CPU: only the networks and peers that decide, in about five minutes"
    )
    parser.add_argument(
        "--int8", action="store_true", help="CPU: eight bits beside float32, in one thread, then in all; 720 s"
    )
    parser.add_argument("--engine", choices=tuple(ON_GPU), help="GPU: only the networks that this engine is for")
    parser.add_argument(
        "--seconds", type=float, help="skip, and say so, what does not fit; default: 200, on a CPU 1140, --quick 300"
    )
    arguments = parser.parse_args()
    device = chosen_device(parser, arguments, "measure")
    around = environment(device)
    works: Sequence[Workload]
    ways: Device
    if device == "cuda":
        works = [work for engine, listed in ON_GPU.items() if arguments.engine in (None, engine) for work in listed]
        seconds, ways = arguments.seconds or 200, GpuWays()
    elif arguments.int8:
        return int8([work for work in INT8_ON_CPU if arguments.only in str(work)], arguments.seconds or 720)
    else:
        works = KEY_ON_CPU if arguments.quick else ALL_ON_CPU
        seconds = arguments.seconds or (300 if arguments.quick else 1140)
        ways = cpu_ways.started(KEY_PEERS if arguments.quick else ALL_PEERS)
    run([work for work in works if arguments.only in str(work)], around, seconds, ways)
    return conclude(around)


def int8(works: Sequence[Workload], seconds: float) -> int:
    """All works in one thread, then in as many as there are cores, which share `seconds`."""
    failed, end, counts = 0, time.monotonic() + seconds, sorted({1, torch.get_num_threads()})
    for threads in counts:
        torch.set_num_threads(threads)
        around = environment("cpu")
        left = end - time.monotonic()
        # One thread takes nearly twice as long as two.
        run(works, around, left if threads == counts[-1] else 0.65 * left, cpu_ways.started(INT8_PEERS))
        failed |= conclude(around)
    return failed


if __name__ == "__main__":
    sys.exit(main())
