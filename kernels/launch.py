"""A kernel launch as a value: built from tensors, run at once or compiled ahead of time for a GPU that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class Launch:
    """What runs, on which grid, with which arguments.

    arguments: by parameter name: tensors, integers, None and the constexprs.
    num_warps, num_stages: as in Triton.
    max_registers: per thread. Left alone, the assembler rather spills a little than have one block less on a
        multiprocessor.
    """

    kernel: triton.JITFunction
    grid: tuple[int]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. Device assertions stay in: an index out of range must stop the kernel, not read on."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "debug": True,
            "sanitize_overflow": False,
        }

    def run(self) -> None:
        """Enqueue it on the current stream of the tensors' device."""
        self.kernel[self.grid](**self.arguments, **self.options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def clamp_power_of_two(n: int, largest: int) -> int:
    """The largest power of two that is not above `n`, within 1 … `largest`."""
    return min(1 << max(n.bit_length() - 1, 0), largest)
