"""An installation → its versions, devices, available kernels with the reason for each missing one, and variables."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

from .. import ops
from .environment import inspect_environment

PACKAGES = (
    "torch", "triton", "numpy", "safetensors", "torchvision", "timm", "lightning", "typer", "rich", "matplotlib",
)  # fmt: skip
# Variables of other programs that change what eefast does.
VARIABLES = ("ATEN_CPU_CAPABILITY", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "XDG_CACHE_HOME")


def inspect_installation() -> dict[str, Any]:
    """What `eefast env` prints, as JSON holds it; no part of it raises.

    versions: of eefast, Python and packages, None for those that are not installed.
    system: platform, processor, the vector instructions that PyTorch and the C++ kernels use, number of threads.
    devices: CUDA devices by their names in PyTorch.
    kernels: see `kernels`.
    exits_on_gpu: what evaluates exits on GPUs, see `ops.exit_kernels`.
    variables: EEFAST_* and `VARIABLES` as far as they are set.
    """
    around = inspect_environment()
    return {
        "versions": {
            "eefast": around["eefast"],
            "commit": around["commit"],
            "python": around["python"],
            **{name: version(name) for name in PACKAGES},
        },
        "system": {
            "platform": platform.platform(),
            "processor": around["processor"],
            "pytorch_instructions": around["capability"],
            "cpp_instructions": attempted(ops.instruction_set),
            "threads": around["threads"],
        },
        "devices": attempted(devices),
        "kernels": kernels(),
        "exits_on_gpu": attempted(lambda: ops.exit_kernels() or "plain PyTorch"),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith("EEFAST_") or k in VARIABLES},
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def devices() -> dict[str, str]:
    """cuda:0 … → name, compute capability and memory."""
    found = {}
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        memory = device.total_memory / 2**30
        found[f"cuda:{i}"] = f"{device.name}, compute capability {device.major}.{device.minor}, {memory:.0f} GiB"
    return found


def kernels() -> dict[str, str]:
    """Implementation of the ops → "available", or why it is not; the references in PyTorch always are."""
    no_gpu = None if attempted(torch.cuda.is_available) is True else "PyTorch finds no CUDA device"
    missing = {
        "PyTorch": None,
        "C++ on the CPU": ops.CPP_MISSING,
        "CUDA C++": ops.CUDA_MISSING or no_gpu,
        "Triton": ops.TRITON_MISSING or no_gpu,
    }
    return {name: why or "available" for name, why in missing.items()}


def attempted(look: Callable[[], Any]) -> Any:
    """What `look` returns, or its error as a text."""
    try:
        return look()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
