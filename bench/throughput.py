"""Whole networks in batches: thresholds for a stated mix of exits, answers checked, then all ways timed in turns.

The CPU's ways run in separate processes, see cpu_runs.py; a GPU's in this one, see gpu_runs.py.
"""

from __future__ import annotations

import argparse
import sys

import cpu_runs
import gpu_runs
import torch
from peers import ALL_PEERS, KEY_PEERS
from rows import environment, now, read, results_file
from summary import failures, show


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help='what has this in its name, such as "eenet20, batch 256"'
    )
    parser.add_argument(
        "--quick", action="store_true", help="CPU: only the networks and peers that decide, in about five minutes"
    )
    parser.add_argument("--engine", choices=tuple(gpu_runs.WORK), help="GPU: only the networks that this engine is for")
    parser.add_argument(
        "--seconds", type=float, help="skip, and say so, what does not fit; default: 200, on a CPU 1140, --quick 300"
    )
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; leave the option out to measure the CPU")
    around, since = environment(device), now()
    if device == "cuda":
        works = [
            work for engine, listed in gpu_runs.WORK.items() if arguments.engine in (None, engine) for work in listed
        ]
        gpu_runs.run([work for work in works if arguments.only in str(work)], around, arguments.seconds or 200)
    else:
        seconds = arguments.seconds or (300 if arguments.quick else 1140)
        plan = cpu_runs.KEY_WORK if arguments.quick else cpu_runs.ALL_WORK
        peers = KEY_PEERS if arguments.quick else ALL_PEERS
        cpu_runs.run([work for work in plan if arguments.only in str(work)], around, seconds, peers)
    rows = read([results_file(around)], since)
    print(show(rows))
    return failures(rows)


if __name__ == "__main__":
    sys.exit(main())
