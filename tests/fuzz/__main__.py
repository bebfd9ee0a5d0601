"""Checks random networks in random ways until enough rows are answered; prints figures and what failed as code."""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import count
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
# Threads that spin while they wait take the time of the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from fuzz_check import PER_TASK, Case, Found, check, check_some


def answers(first: int, jobs: int) -> Iterator[Found]:
    """What comes of case after case, from `jobs` processes, without end."""
    firsts = count(first, PER_TASK)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(check_some, next(firsts)) for _ in range(jobs + 1)]
        try:
            while True:
                yield waiting.pop(0).result()
                waiting.append(pool.submit(check_some, next(firsts)))
        finally:
            pool.shutdown(cancel_futures=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000, help="rows to answer, 20,000 by default")
    parser.add_argument("--seed", type=int, default=1, help="of the first case; the following ones count on")
    parser.add_argument("--jobs", type=int, default=2, help="processes, 2 by default")
    parser.add_argument("--case", type=int, help="repeat one case")
    options = parser.parse_args()
    found, begin = Found(), time.perf_counter()
    if options.case is not None:
        found = check(Case(options.case))
    elif options.rows > 0:
        for some in answers(options.seed * 10**6, options.jobs):
            for problem in some.problems:
                print(f"\n{problem}", flush=True)
            found.add(some)
            print(f"\r{found.rows:,} of {options.rows:,} rows ", end="", file=sys.stderr, flush=True)
            if found.rows >= options.rows:
                break
    if options.case is not None:
        print("\n".join(found.problems))
    print(
        f"\n{found.networks:,} networks, {found.calls:,} calls, {found.rows:,} rows in "
        f"{time.perf_counter() - begin:,.0f} s, torch {torch.__version__}; {found.refused:,} ways refused by name\n"
        f"{len(found.problems)} problems; {found.edge:,} rows left elsewhere within the margin of a threshold"
    )
    for name in sorted(found.engines):
        print(f"{name:24}{found.engines[name]:>10,} rows")
    for name in sorted(found.error):
        print(f"asked for {name:24} largest error of logits {found.error[name]:.1e} of the largest")
    who = resource.RUSAGE_CHILDREN if options.case is None else resource.RUSAGE_SELF
    print(f"largest memory of a process {resource.getrusage(who).ru_maxrss / 1024:,.0f} MB")
    return bool(found.problems)


if __name__ == "__main__":
    sys.exit(main())
