"""The op namespace `eefast::` and the optional C++ library behind it."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.file_baton import FileBaton

log = logging.getLogger("eefast")

namespace = torch.library.Library("eefast", "DEF")

TRITON_MISSING = None if find_spec("triton") else "Triton is not installed; it comes with PyTorch's CUDA builds"
"""None where the Triton kernels can be had, else the reason why the references run on GPUs instead."""


TWINS = ("exit_head", "compact")
"""Ops with kernels in CUDA C++ beside those in Triton; in the library they are called `<name>_cuda`."""


def exit_kernels() -> str:
    """What evaluates exits on GPUs: "triton" where it is installed, else "cuda", else "", plain PyTorch.

    The variable EEFAST_EXIT_KERNELS chooses one by name; `ValueError` where that one is not there.
    """
    there = {"triton": TRITON_MISSING is None, "cuda": _has_twin("exit_head")}
    wanted = os.environ.get("EEFAST_EXIT_KERNELS", "")
    if not wanted:
        return next((name for name, found in there.items() if found), "")
    if not there.get(wanted):
        missing = f"cannot run here: {TRITON_MISSING if wanted == 'triton' else 'built without a CUDA toolkit'}"
        problem = missing if wanted in there else "is unknown; set it to triton or cuda, or leave it out"
        raise ValueError(f"EEFAST_EXIT_KERNELS={wanted!r} {problem}")
    return wanted


def _has_twin(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"eefast::{name}_cuda", "CUDA")


def implement_on_cuda(name: str, launcher: Callable[..., Any]) -> None:
    """Put a Triton launcher behind an op on GPUs, or its twin in CUDA C++ where that is chosen."""
    if TRITON_MISSING is None:
        namespace.impl(name, on_device_of_features(_or_twin(name, launcher) if name in TWINS else launcher), "CUDA")


def _or_twin(name: str, launcher: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*args: Any) -> Any:
        if exit_kernels() == "cuda":
            return getattr(torch.ops.eefast, f"{name}_cuda").default(*args)
        return launcher(*args)

    return chosen


def implement_twins() -> None:
    """Without Triton: the kernels in CUDA C++, where the library has them; called once it is loaded."""
    for name in TWINS:
        if TRITON_MISSING is not None and _has_twin(name):
            namespace.impl(name, getattr(torch.ops.eefast, f"{name}_cuda").default, "CUDA")


def on_device_of_features(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device; the tensors may be on another one."""

    @functools.wraps(launcher)
    def guarded(features: Tensor, *args: Any) -> Any:
        with torch.cuda.device(features.device):
            return launcher(features, *args)

    return guarded


def check_written(name: str, tensor: Tensor) -> None:
    """`RuntimeError` where two elements of a tensor that gets written share memory."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires grad, but is written without one; give it as .detach()")
    if tensor.numel() == 0:
        return
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            raise RuntimeError(f"{name} has overlapping strides {list(tensor.stride())}; give it memory of its own")
        reach += stride * (size - 1)


Named = tuple[str, Tensor | None]


def refuse_gradient(name: str, tensor: Tensor, op: str) -> None:
    """`ValueError` where a gradient would be needed, which the ops do not have."""
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but {op} has no gradient; call it under torch.no_grad()")


def check_stored(*given: Named, optional: Sequence[str] = ()) -> None:
    """`RuntimeError` where a tensor's elements are not all in memory: sparse ones, those of a freed storage, None."""
    for name, tensor in given:
        if tensor is None:
            if name in optional:
                continue
            raise RuntimeError(f"{name} is None; expected a tensor")
        if tensor.layout != torch.strided:
            raise RuntimeError(f"{name} has the layout {tensor.layout}; convert it with .to_dense()")
        stored = tensor.untyped_storage().nbytes()
        if stored < tensor.nbytes or stored == 0:
            needed = (tensor.storage_offset() + _reach(tensor.shape, tensor.stride())) * tensor.element_size()
            if tensor.numel() and needed > stored:
                raise RuntimeError(
                    f"{name} needs {needed} bytes of its storage, which has {stored}; it has been freed or resized"
                )


def check_apart(written: Iterable[Named], read: Iterable[Named]) -> None:
    """`RuntimeError` where what is written shares memory with what is read, or with what else is written."""
    written = list(written)
    given = [(name, tensor, *_span(tensor)) for name, tensor in (*written, *read) if tensor is not None]
    for i, (name, tensor, begin, end) in enumerate(given[: len(written)]):
        for other_name, other, other_begin, other_end in given[i + 1 :]:
            if max(begin, other_begin) < min(end, other_end) and not _beside(tensor, begin, other, other_begin):
                raise RuntimeError(f"{name} shares memory with {other_name}; give it memory of its own")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first element and behind the last one."""
    begin = tensor.data_ptr()
    return begin, begin + _reach(tensor.shape, tensor.stride()) * tensor.element_size() if tensor.numel() else begin


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1


def _beside(a: Tensor, a_begin: int, b: Tensor, b_begin: int) -> bool:
    """Whether rows of one size apart take turns in memory, as columns of one table do."""
    if a.dim() == 0 or b.dim() == 0 or len(a) < 2 or len(b) < 2:
        return False
    pitch, other_pitch = (x.stride(0) * x.element_size() for x in (a, b))
    row, other_row = (_reach(x.shape[1:], x.stride()[1:]) * x.element_size() for x in (a, b))
    after = (b_begin - a_begin) % pitch if pitch else 0
    return 0 < pitch == other_pitch and after >= row and after + other_row <= pitch


def check_fake(owner: Tensor | None, *given: Named) -> None:
    """`RuntimeError` for tensors of several devices: with one on "meta" the op would do nothing and say nothing."""
    for name, tensor in given:
        if owner is None:
            raise RuntimeError(f"{name} is given, but None in the place of the first tensor; expected one")
        if tensor is not None and tensor.device != owner.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {owner.device}, where the others are")


def check_range_on_cuda(features: Tensor, rows: Tensor, *weights: tuple[str, Tensor]) -> None:
    """`RuntimeError` where the Triton kernels would count beyond 32 bits."""
    if features.shape[1:].numel() >= 2**31:
        raise RuntimeError(f"features has shape {list(features.shape)}, on CUDA a sample has fewer than 2³¹ elements")
    if len(rows) >= 2**29:
        raise RuntimeError(f"rows has {len(rows)} entries, on CUDA fewer than 2²⁹ at a time; split the batch")
    for name, tensor in weights:
        if tensor.numel() >= 2**31:
            raise RuntimeError(f"{name} has {tensor.numel()} elements, on CUDA fewer than 2³¹; use engine='reference'")


def _built_in_place(package: Path) -> list[Path]:
    """In a source checkout that was never built: compile now, once, with ninja where it is installed."""
    checkout, failed = package.parent, package / ".building_failed"
    if not (checkout / "setup.py").exists() or not (checkout / "csrc").is_dir() or not os.access(package, os.W_OK):
        return []
    youngest = max(path.stat().st_mtime for path in (checkout / "csrc").rglob("*.*"))
    if failed.exists() and failed.stat().st_mtime > youngest:
        return []
    baton = FileBaton(str(package / ".building"))
    if not baton.try_acquire():
        baton.wait()
        return sorted(package.glob("_C*.so"))
    try:
        log.warning("compiling the C++ kernels of the checkout %s, once; this takes a minute or two", checkout)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
        found = sorted(package.glob("_C*.so"))
        if not found:
            log.warning("that failed, plain PyTorch runs instead: %s", (done.stderr or done.stdout)[-2000:])
            failed.touch()
        return found
    finally:
        baton.release()


def load_cpp() -> str | None:
    """Load the C++ kernels, which replace the Python references on the CPU; None, or why that was not possible.

    Raises `OSError` where EEFAST_LIBRARY names a library that does not load.
    """
    if os.environ.get("EEFAST_USE_CPP", "1") == "0":
        return "switched off by EEFAST_USE_CPP=0"
    if wanted := os.environ.get("EEFAST_LIBRARY"):
        torch.ops.load_library(wanted)
        return None
    package = Path(__file__).parent.parent
    libraries = sorted(package.glob("_C*.so")) or _built_in_place(package)
    if not libraries:
        return "not built; install with a C++ compiler"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None
