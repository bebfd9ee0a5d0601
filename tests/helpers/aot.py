"""Ahead-of-time proof of the Triton kernels: compiles every launch for GPUs that are not here, reads what came out."""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kernel_variants
import triton
from eefast.kernels.launch import Launch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

# Shared memory that one block may use, in bytes; Triton compiles what exceeds it, and fails at the first launch.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
REGISTER_LIMIT = 255
EXPECTATIONS = {"wide_loads", "tensor_cores"}
# Outside of the checkout, so that a fresh clone finds what an older one has compiled.
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eefast" / "aot"


@dataclass(frozen=True)
class Report:
    """What the compiler made of one launch.

    registers: per thread.  shared: bytes per block.  stack: bytes of local memory per thread.
    spills: instructions that load from or store to local memory.
    loads: instructions that read global memory, by opcode and bits, as in {"LDG.128": 6}; LDGSTS is cp.async.
    tensor: tensor core instructions, by opcode: HMMA, HGMMA (wgmma), UTCHMMA (tcgen05), …
    in_flight: bytes that a thread reads from global memory in one pass of a loop that has no other loop inside it, or
        outside of all loops, whichever is most: what it can wait for at a time.
    """

    capability: int
    registers: int
    shared: int
    stack: int
    spills: int
    loads: dict[str, int]
    tensor: dict[str, int]
    in_flight: int

    def failures(self, expects: Iterable[str] = ()) -> list[str]:
        """What would not run, or run slowly, on this GPU; empty if all is well."""
        if unknown := set(expects) - EXPECTATIONS:
            raise ValueError(f"expects = {sorted(unknown)} is unknown; there are {sorted(EXPECTATIONS)}")
        limit = SHARED_LIMIT[self.capability]
        bits = [int(name.split(".")[1]) for name in self.loads]
        narrow = "wide_loads" in expects and min(bits, default=0) < 32
        checks = {
            f"{self.shared} bytes of shared memory, the limit is {limit}": self.shared > limit,
            f"{self.registers} registers, the limit is {REGISTER_LIMIT}": self.registers > REGISTER_LIMIT,
            f"{self.spills} spill instructions ({self.stack} bytes of stack), the limit is 0": self.spills > 0,
            f"0 16-byte global loads among {self.loads}, at least 1 is expected": "wide_loads" in expects
            and max(bits, default=0) < 128,
            f"global loads of single elements among {self.loads}, 16-byte ones are expected": narrow,
            "0 tensor core instructions, at least 1 is expected": "tensor_cores" in expects and not self.tensor,
        }
        return [f"sm_{self.capability}: {message}" for message, failed in checks.items() if failed]


def missing_tools() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell, knobs.nvidia.cuobjdump
    except RuntimeError as error:
        return f"this build of Triton brings no CUDA tools: {error}"
    return None


def compile_for(launch: Launch, capability: int) -> Report:
    """Compiles what a launch would compile; its tensors may be on device "meta". Takes the report from the cache if
    nothing that goes into it has changed.
    """
    source, target, options, file = prepare(launch, capability)
    if report := _load(file):
        return report
    # The report is what is kept; in Triton's cache every edit of a kernel would add megabytes.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        compiled = triton.compile(source, target=target, options=options.__dict__)
        report = _read(compiled.asm["cubin"], compiled.metadata.shared, capability, Path(folder))
    CACHE.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(asdict(report)))
    scratch.replace(file)
    return report


def cached(launch: Launch, capability: int) -> Report | None:
    """The report, if it is in the cache."""
    return _load(prepare(launch, capability)[-1])


def _load(file: Path) -> Report | None:
    return Report(**json.loads(file.read_text())) if file.exists() else None


def prepare(launch: Launch, capability: int) -> tuple[ASTSource, GPUTarget, Any, Path]:
    """Source, target, options and cache file; types, constants and alignments as `JITFunction.run` finds them."""
    if capability not in SHARED_LIMIT:
        raise ValueError(f"capability = {capability} has no known limits; choose from {sorted(SHARED_LIMIT)}")
    if not isinstance(launch.kernel, triton.JITFunction):
        raise TypeError(
            f"launch.kernel is an object of {type(launch.kernel).__name__}; unset TRITON_INTERPRET to compile it"
        )
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    keywords = launch.arguments | launch.options
    options, signature, constexprs, attributes = launch.kernel._pack_args(backend, keywords, *bind(**keywords))
    source = ASTSource(launch.kernel, signature, constexprs, attributes)
    # source.hash() covers the kernel with all that it calls, signature, constexprs and attributes.
    readers = (inspect.getsource(part) for part in (Report, _read, in_flight))
    key = source.hash(), options.hash(), triton.__version__, *readers
    return source, target, options, CACHE / f"{hashlib.sha256(repr(key).encode()).hexdigest()}.json"


def _read(cubin: bytes, shared: int, capability: int, folder: Path) -> Report:
    file = folder / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = [list(map(int, found)) for found in re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)]
    # `/*0a30*/  @!P0 LDG.E.128 R4, …`: the opcode follows the address and the predicate.
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", text, re.MULTILINE)
    if not usage or not opcodes:
        # Silence would read as "no spills".
        raise RuntimeError(
            f"cuobjdump wrote what tests/helpers/aot.py cannot read; adapt its patterns to: {text[:2000]}"
        )
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    loads = Counter(f"{opcode.split('.')[0]}.{bits}" for opcode in opcodes if (bits := _bits_loaded(opcode)))
    return Report(
        capability=capability,
        registers=max(registers for registers, _, _ in usage),
        shared=shared,
        stack=max(stack + local for _, stack, local in usage),
        spills=names["LDL"] + names["STL"],
        loads=dict(sorted(loads.items())),
        tensor={name: count for name, count in sorted(names.items()) if name.endswith("MMA")},
        in_flight=in_flight(text),
    )


def _bits_loaded(opcode: str) -> int:
    """What an instruction reads from global memory, in bits; 0 for all others."""
    name, *modifiers = opcode.split(".")
    if name not in ("LDG", "LDGSTS"):
        return 0
    found = [match for match in map(re.compile(r"[US]?(8|16|64|128|256)").fullmatch, modifiers) if match]
    return int(found[0][1]) if found else 32


def in_flight(sass: str) -> int:
    """`Report.in_flight`, from what cuobjdump writes of one kernel."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?);", sass, re.MULTILINE)
    code = [(int(address, 16), text) for address, text in lines]
    jumps = [(int(found[1], 16), at) for at, text in code if (found := re.match(r"BRA\b.*?(0x[0-9a-f]+)", text))]
    loops = [(first, last) for first, last in jumps if first < last]
    inside = [
        sum(_bits_loaded(text.split()[0]) for at, text in code if first <= at <= last)
        for first, last in loops
        if not any(first <= a and b <= last for a, b in loops if (a, b) != (first, last))
    ]
    outside = [text for at, text in code if not any(first <= at <= last for first, last in loops)]
    return max(*inside, sum(_bits_loaded(text.split()[0]) for text in outside), 0) // 8


@functools.cache
def variants() -> dict[str, tuple[Launch, frozenset[str]]]:
    """Every kernel in every configuration, by name: the launch, and what is expected of it."""
    found = list(kernel_variants.variants())
    counts = Counter(name for name, _, _ in found)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(
            f"tests/helpers/kernel_variants.py names {twice} more than once; give each variant another name"
        )
    return {name: (launch, expects) for name, launch, expects in found}


def compile_variant(name: str, capability: int) -> Report:
    try:
        return compile_for(variants()[name][0], capability)
    except Exception as error:
        # Triton's exceptions cannot be pickled for the process that asked.
        raise RuntimeError(f"does not compile: {type(error).__name__}: {error}") from None


def compilers(count: int) -> ProcessPoolExecutor:
    """Processes to compile in, started at the first task; spawned, since a fork of torch's threads may hang."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def table(reports: dict[str, list[Report | None]], capabilities: list[int]) -> Table:
    rows = Table(box=None, pad_edge=False, header_style="bold")
    rows.add_column("variant", no_wrap=True)
    for capability in capabilities:
        rows.add_column(f"sm_{capability}", justify="right", no_wrap=True)
    rows.add_column("global loads by bits")
    rows.add_column("tensor cores")
    for name, found in reports.items():
        cells = [f"{r.registers} {r.shared / 1024:.1f} {r.spills}" if r else "-" for r in found]
        there = [report for report in found if report]
        rows.add_row(name, *cells, _ranges([r.loads for r in there]), _ranges([r.tensor for r in there]))
    return rows


def _ranges(counts: list[dict[str, int]]) -> str:
    """Counts by name over the GPUs that have any, as in "HGMMA 18, HMMA 32–36"."""
    parts = []
    for name in sorted({name for count in counts for name in count}):
        numbers = [count[name] for count in counts if name in count]
        least, most = min(numbers), max(numbers)
        parts.append(f"{name} {most}" if least == most else f"{name} {least}–{most}")
    return ", ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", default="", help="only variants whose name contains this")
    parser.add_argument("--capability", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    arguments = parser.parse_args()
    names = [name for name in variants() if arguments.part in name]
    if not names:
        parser.error(f"no variant's name contains {arguments.part!r}; there are: {', '.join(variants())}")

    failures = []
    jobs = [(name, capability) for name in names for capability in arguments.capability]
    reports = {(name, capability): cached(variants()[name][0], capability) for name, capability in jobs}
    with compilers(2) as pool:
        futures = {pool.submit(compile_variant, *job): job for job in jobs if reports[job] is None}
        done = track(as_completed(futures), "compiling", total=len(futures), console=Console(stderr=True))
        for future in done if futures else ():
            name, capability = futures[future]
            try:
                reports[name, capability] = future.result()
            except Exception as error:
                failures.append(f"{name}: sm_{capability}: {error}")
    for (name, _), report in reports.items():
        failures += [f"{name}: {message}" for message in (report.failures(variants()[name][1]) if report else ())]

    console = Console()
    if not console.is_terminal:
        console.width = 240
    console.print("registers per thread, KB of shared memory per block, spill instructions\n")
    console.print(table({n: [reports[n, c] for c in arguments.capability] for n in names}, arguments.capability))
    console.print(f"\n{len(jobs)} compilations, {len(futures)} of them not in {CACHE}, {len(failures)} failures")
    for failure in failures:
        console.print(failure, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
