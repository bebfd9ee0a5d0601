"""The op namespace `eefast::` and the optional C++ library behind it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

namespace = torch.library.Library("eefast", "DEF")

TRITON_MISSING = None if find_spec("triton") else "Triton is not installed; it comes with PyTorch's CUDA builds"
"""None where the Triton kernels can be had, else the reason why the references run on GPUs instead."""


def implement_on_cuda(name: str, launcher: Callable[..., Any]) -> None:
    """Put a Triton launcher behind an op on GPUs; without Triton the reference stays."""
    if TRITON_MISSING is None:
        namespace.impl(name, on_device_of_features(launcher), "CUDA")


def on_device_of_features(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; the tensors may be on another one."""

    @functools.wraps(launcher)
    def guarded(features: Tensor, *args: Any) -> Any:
        with torch.cuda.device(features.device):
            return launcher(features, *args)

    return guarded


def check_written(name: str, tensor: Tensor) -> None:
    """`RuntimeError` where two elements of a tensor that gets written share memory."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            raise RuntimeError(f"{name} has overlapping strides {list(tensor.stride())}; give it memory of its own")
        reach += stride * (size - 1)


def check_range_on_cuda(features: Tensor, rows: Tensor, *weights: tuple[str, Tensor]) -> None:
    """`RuntimeError` where the Triton kernels would count beyond 32 bits."""
    if features.shape[1:].numel() >= 2**31:
        raise RuntimeError(f"features has shape {list(features.shape)}, on CUDA a sample has fewer than 2³¹ elements")
    if len(rows) >= 2**29:
        raise RuntimeError(f"rows has {len(rows)} entries, on CUDA fewer than 2²⁹ at a time; split the batch")
    for name, tensor in weights:
        if tensor.numel() >= 2**31:
            raise RuntimeError(f"{name} has {tensor.numel()} elements, on CUDA fewer than 2³¹; use engine='reference'")


def load_cpp() -> str | None:
    """Load the C++ kernels, which replace the Python references on the CPU; None, or why that was not possible.

    Raises `OSError` where EEFAST_LIBRARY names a library that does not load.
    """
    if os.environ.get("EEFAST_USE_CPP", "1") == "0":
        return "switched off by EEFAST_USE_CPP=0"
    if wanted := os.environ.get("EEFAST_LIBRARY"):
        torch.ops.load_library(wanted)
        return None
    libraries = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    if not libraries:
        return "not built; install with a C++ compiler"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None
