"""A GPU that is not there: what is asked for on "cuda" is made on the CPU, for the commands that measure on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

NAME = "GPU of the tests"


def on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


class CudaOnCpu(TorchFunctionMode):
    """Devices in the arguments of PyTorch's functions are replaced."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*map(on_cpu, args), **{name: on_cpu(value) for name, value in (kwargs or {}).items()})


def stand_in(monkeypatch: pytest.MonkeyPatch) -> CudaOnCpu:
    """For what PyTorch says of its GPU; the rest is in the mode that is returned."""
    answers: dict[str, Any] = {
        "is_available": True,
        "get_device_name": NAME,
        "mem_get_info": (2**40, 2**40),
        "synchronize": None,
        "empty_cache": None,
    }
    for name, value in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(on_cpu(device)))
    return CudaOnCpu()
