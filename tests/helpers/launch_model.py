"""A launch and what the compiler made of it → how long it takes on an H200: modelled, not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aot import Report
from eefast.kernels.launch import Launch, ceil_div
from torch import Tensor

MULTIPROCESSORS, WARPS, REGISTERS, SHARED = 132, 64, 65536, 228 << 10
MEMORY, CACHE = 4.3e12, 5.5e12
"""Bytes per second from memory, and through the second-level cache."""

PRODUCTS = {2: 8e14, 4: 1.6e14, 8: 1.6e14}
"""Sums of the tensor cores per second, by bytes of an element; float32 is three products of fewer bits."""

LATENCY, START = 0.5e-6, 5e-6
"""Seconds from a load to its value; what a launch may take besides, and for its first loads."""

LARGE, IN_FLIGHT = 10e6, 1e6
"""A launch that moves `LARGE` bytes must have `IN_FLIGHT` bytes on their way; 2 MB would fill the memory's pipeline.
Not a convolution, which reads most of its bytes again from the cache.
"""

SMALL = MEMORY * 1e-6
"""Bytes below which a launch needs no program on every multiprocessor: those of a microsecond."""


def _few_classes(a: dict[str, Any]) -> int:
    return ceil_div(a["PIXELS"], a["BLOCK_PIXELS"]) + ceil_div(a["CLASSES"] + 1, a["BLOCK_CLASSES"])


def _maps(a: dict[str, Any]) -> int:
    return ceil_div(a["HEIGHT"] * a["WIDTH"], a["BLOCK_PIXELS"]) * a["steps"]


def _whole_conv_head(a: dict[str, Any]) -> int:
    classify = ceil_div(a["CLASSES"] + 1, a["BLOCK_CLASSES"]) * ceil_div(a["CHANNELS"], a["BLOCK_CHANNELS"])
    return _maps(a) * ceil_div(a["CHANNELS"], a["BLOCK_OUT"]) + classify


def _indexed_conv(a: dict[str, Any]) -> int:
    pixels = a["size"] * a["OUT_HEIGHT"] * a["OUT_WIDTH"]
    tiles = ceil_div(pixels, a["BLOCK_PIXELS"]) * ceil_div(a["CHANNELS"], a["BLOCK_OUT"])
    return ceil_div(tiles, a["GRID"]) * a["steps"]


PASSES: dict[str, Callable[[dict[str, Any]], int]] = {
    "_few_classes_kernel": _few_classes,
    "_pool_kernel": lambda a: ceil_div(a["PART_PIXELS"], a["BLOCK_PIXELS"]),
    "_classify_kernel": lambda a: ceil_div(a["SLICE"], a["BLOCK_CHANNELS"]),
    "_decide_kernel": lambda a: 1,
    "_conv_kernel": _whole_conv_head,
    "_conv_pool_kernel": _maps,
    "_indexed_conv_kernel": _indexed_conv,
    "_gather_survivors_kernel": lambda a: 1,
}
"""Passes of a program through its loops of loads, which wait for one another, by kernel; GRID: programs."""


@dataclass(frozen=True)
class Model:
    """programs: of the launch.  resident: of them at a time.
    in_flight: bytes on their way at a time, of all programs: what the code can have, or if less what is moved per wait.
    moved: bytes that must come from memory or go to it.  passes: of a program, see `PASSES`.
    waiting, moving, through_cache, computing: seconds of waits one after the other; of `moved`; of what programs load
    that others load, too; of the convolution.
    """

    programs: int
    resident: int
    in_flight: int
    moved: int
    passes: int
    waiting: float
    moving: float
    through_cache: float
    computing: float

    @property
    def seconds(self) -> float:
        return max(self.waiting, self.moving, self.through_cache, self.computing)

    def failures(self) -> list[str]:
        """What leaves the memory idle; empty if all is well."""
        bound = 3 * max(self.moving, self.computing) + START
        checks = {
            f"{self.programs} programs, {MULTIPROCESSORS} multiprocessors": self.moved > SMALL
            and self.programs < MULTIPROCESSORS,
            f"{self.in_flight / 1e3:.0f} KB on their way, {IN_FLIGHT / 1e3:.0f} are expected": self.moved > LARGE
            and self.computing == 0
            and self.in_flight < IN_FLIGHT,
            f"{self.passes} passes wait {1e6 * self.waiting:.0f} µs, {1e6 * bound:.0f} are allowed": self.waiting
            > bound,
        }
        return [message for message, failed in checks.items() if failed]


def moved(launch: Launch) -> int:
    """Bytes of all tensors of a launch, each once."""
    tensors = {id(x): x for x in launch.arguments.values() if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def model(launch: Launch, report: Report, passes: int | None = None) -> Model:
    """passes: of a kernel that is not in `PASSES`."""
    arguments = launch.arguments | {"GRID": launch.grid[0]}
    if passes is None:
        passes = PASSES[launch.kernel.fn.__name__](arguments)
    threads = 32 * launch.num_warps
    by_registers = REGISTERS // (ceil_div(max(report.registers, 1), 8) * 8 * threads)
    resident = MULTIPROCESSORS * min(WARPS // launch.num_warps, by_registers, SHARED // (report.shared + 1024))
    resident = min(launch.grid[0], resident)
    loop_bytes = report.in_flight * threads
    # Where loops are pipelined, several passes are on their way at a time.
    stages = launch.num_stages - 1 if any(name.startswith("LDGSTS") for name in report.loads) else 1
    waits = ceil_div(launch.grid[0], resident) * passes / stages
    return Model(
        programs=launch.grid[0], resident=resident,
        in_flight=int(min(resident * loop_bytes * stages, moved(launch) / waits)), moved=moved(launch),
        passes=passes, waiting=waits * LATENCY, moving=moved(launch) / MEMORY,
        through_cache=max(moved(launch), _products_loaded(arguments)) / CACHE, computing=_computing(launch.arguments),
    )  # fmt: skip


def _products_loaded(a: dict[str, Any]) -> int:
    """Bytes of sums and weights that the programs of a product load, many of them the same ones."""
    if "SLICES" not in a or "weight" not in a:
        return 0
    return int(a["GRID"] * a["SLICE"] * (a["ROWS"] * a["PARTS"] + a["BLOCK_CLASSES"]) * 4)


def _computing(a: dict[str, Any]) -> float:
    """Seconds that a convolution keeps the tensor cores busy."""
    weight = a.get("conv_weight", a.get("weight"))
    if weight is None or weight.dim() != 4:
        return 0.0
    pixels = a.get("OUT_HEIGHT", a["HEIGHT"]) * a.get("OUT_WIDTH", a["WIDTH"])
    return float(2 * a["size"] * pixels * weight.numel() / PRODUCTS[weight.element_size()])
