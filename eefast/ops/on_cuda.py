"""What runs an op on GPUs: its Triton kernel or its CUDA C++ kernel."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .library import namespace

TRITON_MISSING = None if find_spec("triton") else "Triton is not installed; it comes with PyTorch's CUDA builds"
"""None where Triton is installed, else the reason why its kernels do not run on GPUs."""

IN_CUDA = ("exit_head", "gather_survivors")
"""Ops with a CUDA C++ kernel besides that in Triton; in the C++ library it is the op `<name>_cuda`."""


def exit_kernels() -> str:
    """What evaluates exits on GPUs: "triton" where it is installed, else "cuda", else "", plain PyTorch.

    The variable EEFAST_EXIT_KERNELS chooses one by name; `ValueError` where that one is missing.
    """
    available = {"triton": TRITON_MISSING is None, "cuda": _has_cuda_kernel("exit_head")}
    wanted = os.environ.get("EEFAST_EXIT_KERNELS", "")
    if not wanted:
        return next((name for name, found in available.items() if found), "")
    if not available.get(wanted):
        missing = f"cannot run here: {TRITON_MISSING if wanted == 'triton' else 'built without a CUDA toolkit'}"
        problem = missing if wanted in available else "is unknown; set it to triton or cuda, or leave it out"
        raise ValueError(f"EEFAST_EXIT_KERNELS={wanted!r} {problem}")
    return wanted


def implement_on_cuda(name: str, launcher: Callable[..., Any]) -> None:
    """Register what runs an op on GPUs: its Triton launcher, or its CUDA C++ kernel without Triton or where chosen."""
    if TRITON_MISSING is None:
        chosen = _launcher_or_cuda(name, launcher) if name in IN_CUDA else launcher
        namespace.impl(name, on_device_of_features(chosen), "CUDA")
    elif name in IN_CUDA and _has_cuda_kernel(name):
        namespace.impl(name, _cuda_kernel(name), "CUDA")


def on_device_of_features(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; the tensors may be on another one."""

    @functools.wraps(launcher)
    def guarded(features: Tensor, *args: Any) -> Any:
        with torch.cuda.device(features.device):
            return launcher(features, *args)

    return guarded


def _has_cuda_kernel(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"eefast::{name}_cuda", "CUDA")


def _cuda_kernel(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.eefast, f"{name}_cuda").default  # type: ignore[no-any-return]


def _launcher_or_cuda(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*args: Any) -> Any:
        return _cuda_kernel(name)(*args) if exit_kernels() == "cuda" else launcher(*args)

    return chosen
