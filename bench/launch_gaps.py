"""What a way of running a network costs besides kernels: how often the host waits, how long the GPU is idle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = (
    aten._local_scalar_dense.default,  # .item(), int(), float(), bool()
    aten.allclose.default,
    aten.bincount.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
COPIES = (aten._to_copy.default, aten.copy_.default)


def host_waits(run: Callable[[], Any], device: str, graphs: Any = None) -> int:
    """Calls in `run` that wait for the device.

    device: "cuda"; or "cpu", to count what would wait if the tensors there were on a GPU.
    graphs: an object that counts its waits itself, see `eefast.engines.graphs`.
    """
    before = graphs.waits if graphs else 0
    counter = _Waits(device)
    # Compiled code waits for nothing, and would be compiled again for the counter.
    with torch.compiler.set_stance("force_eager"), _Reads(counter), counter:
        run()
    return counter.count + (graphs.waits - before if graphs else 0)


class _Waits(TorchDispatchMode):
    """Counts what PyTorch executes."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.count = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in READS:
            self.count += self.concerns(args[0])
        elif func in INDEXED and self.concerns(args[0]) and not _fills(func, args):
            # PyTorch turns every mask into indices, whose number the host must know.
            self.count += sum(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif func in COPIES and not kwargs.get("non_blocking", args[2:] == (True,)):
            source = args[0] if func is aten._to_copy.default else args[1]
            self.count += source.device != result.device and (self.concerns(source) or self.concerns(result))
        return result

    def concerns(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device


def _fills(func: Any, args: Any) -> bool:
    """Whether PyTorch fills where a mask is true, without indices."""
    if func is aten.index.Tensor:
        return False
    _, indices, value = args[:3]
    return value.numel() == 1 and value.device.type == "cpu" and len(indices) == 1


class _Reads(TorchFunctionMode):
    """Counts what copies to the host, which executes nothing where the tensor is there already."""

    def __init__(self, counter: _Waits) -> None:
        super().__init__()
        self.counter = counter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.counter.count
        result = func(*args, **(kwargs or {}))
        if func in (Tensor.cpu, Tensor.numpy, Tensor.tolist):
            self.counter.count = before + self.counter.concerns(args[0])
        return result


def busy_seconds(run: Callable[[], Any]) -> float | None:
    """How long the GPU works for `run`, from a trace; None where the profiler is missing or sees no GPU."""
    activities = torch.profiler.ProfilerActivity
    try:
        with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as trace:
            run()
            torch.cuda.synchronize()
        events = [e for e in trace.events() or () if e.device_type == torch.autograd.DeviceType.CUDA]  # type: ignore[attr-defined]
    except (RuntimeError, AssertionError):
        return None
    # An annotation spans all kernels within it, and the gaps between them.
    spans = [(e.time_range.start, e.time_range.end) for e in events if not e.is_user_annotation]
    return covered(spans) / 1e6 if spans else None


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the time is within at least one of the spans (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
