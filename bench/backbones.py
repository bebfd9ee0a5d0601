"""Networks of torchvision and timm with exits attached, on the CPU: answers checked, then all ways timed in turns.

Without exits by ONNX Runtime, OpenVINO and eefast; at half of the cost by eefast and stage by stage by the same
runtimes. In one thread by the time of the process, which others on the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import sys

import cpu_ways
import torch
from command import conclude
from cpu_ways import LARGE_IMAGES
from network_runs import run
from peers import BACKBONE_INT8_PEERS, BACKBONE_PEERS, TORCH_COMPILE
from rows import environment
from workloads import BACKBONE_SIZES, on_backbones

COMPILE_SECONDS = 90


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help='what has this in its name, such as "resnet18"')
    parser.add_argument(
        "--batches", type=sizes, default=BACKBONE_SIZES, metavar="N,N,...", help="images per call; default: 1,8,64"
    )
    parser.add_argument("--threads", type=int, default=1, help="of all ways; default 1; wall time for more")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="skip, and say so, what does not fit; default %(default)s"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile, too: minutes per network and batch size")
    parser.add_argument("--int8", action="store_true", help="eight bits beside float32, instead of the other ways")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads {arguments.threads}: at least 1")
    torch.set_num_threads(arguments.threads)
    works = on_backbones(arguments.batches, COMPILE_SECONDS if arguments.compile else 0)
    works = [work for work in works if arguments.only in str(work)]
    if not works:
        parser.error(f"--only {arguments.only!r}: no such network; there are {', '.join(map(str, on_backbones([1])))}")
    around = environment("cpu")
    peers = BACKBONE_INT8_PEERS if arguments.int8 else BACKBONE_PEERS
    peers = (*peers, TORCH_COMPILE) if arguments.compile else peers
    run(works, around, arguments.seconds, cpu_ways.started(peers, clock_of(arguments.threads)))
    return conclude(around)


def sizes(text: str) -> tuple[int, ...]:
    """Raises `ArgumentTypeError`."""
    try:
        found = tuple(dict.fromkeys(map(int, text.split(","))))
    except ValueError:
        found = ()
    if not found or min(found) < 1 or max(found) > LARGE_IMAGES:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers from 1 to {LARGE_IMAGES}, such as 1,8,64")
    return found


def clock_of(threads: int) -> str:
    """Name in `time`: the time of the process adds up that of all its threads."""
    return "process_time" if threads == 1 else "perf_counter"


if __name__ == "__main__":
    sys.exit(main())
