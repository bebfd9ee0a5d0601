"""Cases of the ops → rows: every answer checked against float64, then timed beside what a user would write.

A GPU's times are Triton's; on a CPU this file is a test for pytest-benchmark too, whose providers take turns, so that
noise falls on all.
"""

from __future__ import annotations

import argparse
import sys
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from command import add_device_option, chosen_device, conclude
from op_cases import (
    BASELINES,
    COPY,
    READ,
    Inputs,
    OpCase,
    Provider,
    check,
    cpu_cases,
    gpu_cases,
    make_inputs,
    providers,
)
from progress import track
from rows import CeilingRow, OpRow, Record, append, environment, first_line, name_of

from eefast.measure.timing import quantiles

QUANTILES = (0.2, 0.5, 0.8)
TURNS, TURN_SECONDS = 5, 0.1
# Maps from here on are larger than last-level caches of CPUs; there a plain copy takes its turns as well.
LARGE = 2**26
Call = Callable[[], Any]
Spans = dict[tuple[OpCase, Provider], list[float]]
"""Seconds per call, of all turns; an empty list: nothing to time."""


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes (read + written) and floating-point operations per second."""

    copy: float
    matmul: float


@dataclass
class Timed:
    """One provider in one timing: `QUANTILES` of the seconds per call, or why there are none."""

    provider: Provider
    timing: str = "launch"
    seconds: Sequence[float] = ()
    note: str = ""


def attempt(provider: Provider, inputs: Inputs) -> tuple[Call | None, str]:
    """A call whose answers are right, or None and why there is none."""
    try:
        call = provider.make(inputs)
        wrong = check(inputs, provider, call)
    except Exception as error:
        return None, first_line(error)
    return (None, f"WRONG: {wrong}") if wrong else (call, "")


def rows_of(case: OpCase, found: Sequence[Timed], typical: int, ceilings: Ceilings) -> list[OpRow]:
    """A row per provider and timing.

    typical: the place in `QUANTILES` of the one that all other figures are computed from, see `OpRow`. ceilings: of the
    device; a plain copy among the providers takes the place of its copy.
    """
    spans = {(one.provider.name, one.timing): one.seconds[typical] for one in found if one.seconds}
    copy = 2 * case.map_bytes / spans[COPY.name, "launch"] if (COPY.name, "launch") in spans else ceilings.copy
    rows = []
    for one in found:
        figures: dict[str, Any] = {}
        if one.seconds:
            work, flops = case.bytes, case.flops
            if one.provider in (COPY, READ):
                work, flops = (2 if one.provider is COPY else 1) * case.map_bytes, 0
            seconds = one.seconds[typical]
            plain = next((spans[name, one.timing] for name in BASELINES if (name, one.timing) in spans), None)
            figures = {
                "bytes": work,
                "flops": flops,
                "microseconds": tuple(s * 1e6 for s in one.seconds),
                "typical": seconds * 1e6,
                "gigabytes_per_s": work / seconds / 1e9,
                "copy_share": work / seconds / copy,
                "bound_share": max(work / copy, flops / ceilings.matmul) / seconds,
                "speedup": plain and plain / seconds,
            }
        shape = {name: getattr(case, name) for name in ("op", "samples", "channels", "classes", "layout", "criterion")}
        shape |= {"height": case.side, "width": case.side, "exit_rate": case.exit_rate, "dtype": name_of(case.dtype)}
        shape |= {"provider": one.provider.name, "timing": one.timing, "bytes": case.bytes, "flops": case.flops}
        rows.append(OpRow(**{**shape, "checked": bool(one.seconds), "note": one.note, **figures}))
    return rows


def measure_ceilings(
    device: str, dtypes: list[torch.dtype], copied_bytes: int, size: int, seconds: Callable[[Call], float]
) -> tuple[dict[torch.dtype, Ceilings], list[CeilingRow]]:
    """A plain copy and, per dtype, a size × size matrix product (of float32 in TF32 where the device has it)."""
    source = torch.randint(256, (copied_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * copied_bytes / seconds(lambda: target.copy_(source))
    found, rows = {}, [CeilingRow("copy", "uint8", copy / 1e9)]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / seconds(partial(torch.matmul, a, b))
        found[dtype] = Ceilings(copy, rate)
        rows.append(CeilingRow("matmul", name_of(dtype), rate / 1e12))
    torch.set_float32_matmul_precision(precision)
    return found, rows


def bench_gpu(only: str, budget: float, around: Record) -> None:
    """Case by case, rows written as soon as they are measured, until the budget of seconds is spent."""
    from triton.testing import do_bench

    torch.backends.cudnn.benchmark = True
    begin = time.perf_counter()
    cases = [case for case in gpu_cases() if only in str(case)]
    dtypes = sorted({case.dtype for case in cases}, key=str)
    ceilings, rows = measure_ceilings(
        "cuda", dtypes, 2**30, 8192, lambda call: do_bench(call, quantiles=[0.5]) / 1e3
    )  # fmt: skip
    append(rows, around)
    for case in track(cases, "ops"):
        free, note = torch.cuda.mem_get_info()[0], ""
        if time.perf_counter() - begin > budget:
            note = f"skipped: the budget of {budget:.0f} s is spent"
        elif case.memory > free:
            note = f"skipped: needs about {case.memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        found = [Timed(provider, note=note) for provider in providers(case)] if note else timed_on_gpu(case)
        append(rows_of(case, found, 1, ceilings[case.dtype]), around)
        torch.cuda.empty_cache()


def timed_on_gpu(case: OpCase) -> list[Timed]:
    from triton.testing import do_bench, do_bench_cudagraph

    inputs, found = make_inputs(case, "cuda"), []
    for provider in providers(case):
        call, note = attempt(provider, inputs)
        if call is None:
            found.append(Timed(provider, note=note))
        else:
            found.append(Timed(provider, seconds=_seconds(do_bench(call, warmup=10, rep=40, quantiles=[*QUANTILES]))))
            try:
                if provider.capturable:
                    torch.cuda.synchronize()
                    milliseconds = do_bench_cudagraph(call, rep=10, quantiles=[*QUANTILES])
                    found.append(Timed(provider, "graph", _seconds(milliseconds)))
            except Exception as error:
                note = first_line(error)
                found.append(Timed(provider, "graph", note=note))
        if note:
            _require_live_device(f"{case}, {provider.name}: {note}")
    return found


def _seconds(milliseconds: Sequence[float]) -> list[float]:
    return [ms / 1e3 for ms in milliseconds]


def _require_live_device(note: str) -> None:
    """After some errors a process can use its GPU no more; going on would repeat that error for every case."""
    try:
        torch.cuda.synchronize()
    except Exception:
        sys.exit(f"bench/ops.py: the GPU is of no use to this process after {note}")


def cpu_providers(case: OpCase) -> tuple[Provider, ...]:
    found = providers(case)
    if case.map_bytes >= LARGE:
        return (*found, COPY)
    return (*found, READ) if case.op == "exit_head" and case.dtype == torch.float32 else found


PLAN = [(case, turn, provider) for case in cpu_cases() for turn in range(TURNS) for provider in cpu_providers(case)]


@lru_cache(maxsize=1)
def cpu_inputs(case: OpCase) -> Inputs:
    return make_inputs(case, "cpu")


@lru_cache(maxsize=8)
def cpu_attempt(case: OpCase, provider: Provider) -> tuple[Call | None, str]:
    return attempt(provider, cpu_inputs(case))


def least_seconds(call: Call) -> float:
    return min(timeit.repeat(call, repeat=5, number=1))


@pytest.fixture(scope="module")
def spans() -> Iterator[Spans]:
    """Collects seconds turn by turn, and writes the rows at the end."""
    found: Spans = {}
    ceilings, rows = measure_ceilings("cpu", [torch.float32], 2**28, 2048, least_seconds)
    yield found
    if found:
        append([*rows, *rows_of_turns(found, ceilings[torch.float32])], environment("cpu"))


def rows_of_turns(spans: Spans, ceilings: Ceilings) -> list[OpRow]:
    cases: dict[OpCase, list[Timed]] = {}
    for (case, provider), seconds in spans.items():
        note = "" if seconds else cpu_attempt(case, provider)[1]
        cases.setdefault(case, []).append(
            Timed(provider, seconds=quantiles(seconds, QUANTILES) if seconds else (), note=note)
        )
    # Other processes only ever add time, so the lower quantile is the typical one.
    return [row for case, found in cases.items() for row in rows_of(case, found, 0, ceilings)]


@pytest.mark.parametrize(("case", "turn", "provider"), PLAN, ids=lambda value: getattr(value, "name", str(value)))
def test_speed(benchmark: Any, spans: Spans, case: OpCase, turn: int, provider: Provider) -> None:
    seconds = spans.setdefault((case, provider), [])
    call, note = cpu_attempt(case, provider)
    if call is None:
        pytest.fail(note)
    estimate = least_seconds(call)
    iterations = max(1, round(1e-4 / estimate))
    rounds = max(3, round(TURN_SECONDS / (iterations * estimate)))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    seconds += benchmark.stats.stats.data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_device_option(parser)
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="such as compact-4096: cases with this in their name"
    )
    parser.add_argument("--seconds", type=float, default=100, help="GPU: skip, and say so, what is beyond; default 100")
    arguments = parser.parse_args()
    device, status = chosen_device(parser, arguments, "measure"), 0
    around = environment(device)
    if device == "cuda":
        bench_gpu(arguments.only, arguments.seconds, around)
    else:
        options = ["-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", arguments.only]
        status = pytest.main([__file__, "--benchmark-enable", "--benchmark-quiet", *options])
    return int(status) or conclude(around)


if __name__ == "__main__":
    sys.exit(main())
