"""Networks that a GPU's later phases measure → torch.compile's code in its cache, a process for each, side by side."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Sequence

import gpu_ways
import torch
from subjects import Network
from workloads import KEY_COMPACT_ON_GPU, RESIDENT_ON_GPU, Workload


def compiled_networks(works: Iterable[Workload]) -> list[tuple[Network, int]]:
    """Network and batch size of those for which the workload measures torch.compile, each once."""
    return list(dict.fromkeys((work.network, work.batch_size) for work in works if work.compile_seconds))


@torch.no_grad()
def compile_one(network: Network, batch_size: int) -> None:
    """The first call compiles; another process finds the code in the cache."""
    images = gpu_ways.subject(network, batch_size).images[:batch_size]
    gpu_ways.plain(network, batch_size, compiled=True, in_graph=False)(images)
    torch.cuda.synchronize()


def compile_all(wanted: Sequence[tuple[Network, int]]) -> list[str]:
    """Those that failed; their processes have said why."""
    # Started afresh, since CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=compile_one, args=one) for one in wanted]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [f"{network.name}, batch {n}" for (network, n), p in zip(wanted, processes, strict=True) if p.exitcode != 0]


def main() -> int:
    wanted = compiled_networks([*KEY_COMPACT_ON_GPU, *RESIDENT_ON_GPU[:2]])
    failed = compile_all(wanted)
    print(f"{len(wanted) - len(failed)} of {len(wanted)} networks compiled", *failed, sep="; not ")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
