"""A kernel launch as a value: built from tensors, run at once or compiled ahead of time for another GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """What runs, on which grid, with which arguments.

    arguments: by parameter name: tensors, integers, None and the constexprs.
    num_warps, num_stages: as in Triton.
    max_registers: per thread. Without it, the assembler prefers a few spills to one block less on a multiprocessor.
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
        """Enqueue it on the current stream of the current device, which must be that of the tensors."""
        self.kernel[self.grid](**self.arguments, **self.options)


def readable(features: Tensor) -> Tensor:
    """`features` [M, C, H, W], or a copy where the kernels would read them in another way than a fresh tensor.

    Pointers within a sample are 32-bit offsets. How wide a load can be decides which thread adds what, so samples that
    start on other addresses, modulo 16 bytes, would be added up in another order.
    """
    if sum((n - 1) * stride for n, stride in zip(features.shape[1:], features.stride()[1:], strict=True)) >= 2**31:
        return features.contiguous(memory_format=torch.channels_last)
    gap = features.stride(0) - features.shape[1:].numel() if len(features) > 1 else 0
    if features.data_ptr() % 16 or gap * features.element_size() % 16:
        return features.clone()
    return features


def strides_of(features: Tensor) -> list[int]:
    """In elements. Where a dimension has size 1 its stride is never used and may be anything; one value for all of
    them, since each would mean another compilation.
    """
    unused = (features.shape[1:].numel(), 1, 1, 1)
    return [s if n > 1 else u for n, s, u in zip(features.shape, features.stride(), unused, strict=True)]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def clamp_power_of_two(n: int, largest: int) -> int:
    """The largest power of two that is not above `n`, within 1 … `largest`."""
    return min(1 << max(n.bit_length() - 1, 0), largest)
