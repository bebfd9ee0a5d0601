"""Microbenchmarks of the ops: every answer checked against float64, then timed beside what a user would write."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from op_cases import BASELINES, COPY, READ, Inputs, OpCase, Provider, check, gpu_cases, make_inputs, providers
from progress import track
from rows import CeilingRow, OpRow, append, environment, first_line, now, read, results_file
from summary import failures, show

QUANTILES = [0.2, 0.5, 0.8]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best: bytes (read + written) and floating-point operations per second."""

    copy: float
    matmul: float


def attempt(provider: Provider, inputs: Inputs) -> tuple[Call | None, str]:
    """A call whose answers are right, or None and why there is none."""
    try:
        call = provider.make(inputs)
        wrong = check(inputs, provider, call)
    except Exception as error:
        return None, first_line(error)
    return (None, f"WRONG: {wrong}") if wrong else (call, "")


def untimed(case: OpCase, provider: Provider, note: str, timing: str = "launch") -> OpRow:
    return _row(case, provider, timing=timing, checked=False, note=note)


def timed(
    case: OpCase, provider: Provider, timing: str, quantiles: list[float], typical: float, baseline: float | None,
    ceilings: Ceilings,
) -> OpRow:  # fmt: skip
    """quantiles, typical, baseline: seconds per call."""
    work, flops = case.bytes, case.flops
    if provider in (COPY, READ):
        work, flops = (2 if provider is COPY else 1) * case.map_bytes, 0
    return _row(
        case,
        provider,
        timing=timing,
        checked=True,
        bytes=work,
        flops=flops,
        microseconds=tuple(s * 1e6 for s in quantiles),
        typical=typical * 1e6,
        gigabytes_per_s=work / typical / 1e9,
        copy_share=work / typical / ceilings.copy,
        bound_share=max(work / ceilings.copy, flops / ceilings.matmul) / typical,
        speedup=baseline and baseline / typical,
    )


def _row(case: OpCase, provider: Provider, **more: Any) -> OpRow:
    shape = {name: getattr(case, name) for name in ("op", "samples", "channels", "classes", "layout", "criterion")}
    shape |= {"height": case.side, "width": case.side, "exit_rate": case.exit_rate}
    shape |= {"dtype": str(case.dtype).removeprefix("torch."), "bytes": case.bytes, "flops": case.flops}
    return OpRow(**{**shape, "provider": provider.name, **more})


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
        rows.append(CeilingRow("matmul", str(dtype).removeprefix("torch."), rate / 1e12))
    torch.set_float32_matmul_precision(precision)
    return found, rows


def bench_gpu(only: str, budget: float) -> None:
    """Case by case, rows written as soon as they are measured, until the budget of seconds is spent."""
    from triton.testing import do_bench

    torch.backends.cudnn.benchmark = True
    around, begin = environment("cuda"), time.perf_counter()
    cases = [case for case in gpu_cases() if only in str(case)]
    dtypes = sorted({case.dtype for case in cases}, key=str)
    ceilings, rows = measure_ceilings(
        "cuda", dtypes, 2**30, 8192, lambda call: do_bench(call, quantiles=[0.5]) / 1e3
    )  # fmt: skip
    append(rows, around)
    for case in track(cases, "ops"):
        free = torch.cuda.mem_get_info()[0]
        if time.perf_counter() - begin > budget:
            note = f"skipped: the budget of {budget:.0f} s is spent"
            append([untimed(case, provider, note) for provider in providers(case)], around)
        elif case.memory > free:
            note = f"skipped: needs about {case.memory / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
            append([untimed(case, provider, note) for provider in providers(case)], around)
        else:
            append(_gpu_rows(case, ceilings[case.dtype]), around)
        torch.cuda.empty_cache()


def _gpu_rows(case: OpCase, ceilings: Ceilings) -> list[OpRow]:
    from triton.testing import do_bench, do_bench_cudagraph

    inputs, rows = make_inputs(case, "cuda"), []
    times: dict[tuple[Provider, str], list[float]] = {}
    for provider in providers(case):
        call, note = attempt(provider, inputs)
        timing = "launch"
        if call is not None:
            times[provider, "launch"] = do_bench(call, warmup=10, rep=40, quantiles=QUANTILES)
            try:
                if provider.capturable:
                    timing = "graph"
                    torch.cuda.synchronize()
                    times[provider, "graph"] = do_bench_cudagraph(call, rep=10, quantiles=QUANTILES)
            except Exception as error:
                note = first_line(error)
        if note:
            rows.append(untimed(case, provider, note, timing))
            _require_live_device(f"{case}, {provider.name}: {note}")
    plain = {timing: ms[1] / 1e3 for (provider, timing), ms in times.items() if provider.name in BASELINES}
    for (provider, timing), milliseconds in times.items():
        quantiles = [ms / 1e3 for ms in milliseconds]
        rows.append(timed(case, provider, timing, quantiles, quantiles[1], plain.get(timing), ceilings))
    return rows


def _require_live_device(note: str) -> None:
    """After some errors a process can use its GPU no more; going on would repeat that error for every case."""
    try:
        torch.cuda.synchronize()
    except Exception:
        sys.exit(f"bench/ops.py: the GPU is of no use to this process after {note}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="such as compact-4096: cases with this in their name"
    )
    parser.add_argument("--seconds", type=float, default=100, help="GPU: skip, and say so, what is beyond; default 100")
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here; leave the option out to measure the CPU")
    begin, status = now(), 0
    if device == "cuda":
        bench_gpu(arguments.only, arguments.seconds)
    else:
        import pytest

        here = Path(__file__).with_name("ops_cpu.py")
        options = ["-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", arguments.only]
        status = pytest.main([str(here), "--benchmark-enable", "--benchmark-quiet", *options])
    rows = read([results_file(environment(device))], since=begin)
    print(show(rows))
    return int(status) or failures(rows)


if __name__ == "__main__":
    sys.exit(main())
