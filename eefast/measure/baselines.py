"""A network → what a user could run instead of eefast: without early exits by several runtimes, or the masked loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model import EarlyExitNet
from ..planning.folding import fold_stage
from . import runtimes
from .quantized_onnx import quantized

Run = Callable[[Tensor], Any]


def plain(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Without early exits, BatchNorm folded: channels-last images [N, C, H, W] in `dtype` → logits [N, K]."""
    return fold_stage(net.plain(), dtype)[0]


def contiguous(module: nn.Module) -> Any:
    """`module` itself, its weights as images that are not channels-last want them, and as ONNX has them."""
    return module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def eager(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> Run:
    """As `plain`, in eager PyTorch."""
    return torch.inference_mode()(plain(net, dtype))


def eager_contiguous(net: EarlyExitNet) -> Run:
    """As `eager` in float32, for images in PyTorch's default layout instead of channels-last."""
    return torch.inference_mode()(contiguous(plain(net)))


def compiled(module: nn.Module, freezing: bool = True, **options: Any) -> Run:
    """`module`, see `plain`, by torch.compile for each batch size; seconds to minutes for each.

    freezing: makes constants of the weights and lays them out for the processor's convolutions. options: of
    torch.compile.
    """
    import torch._inductor.config

    function = torch.no_grad()(torch.compile(module, dynamic=False, **options))
    known: set[torch.Size] = set()

    def run(x: Tensor) -> Any:
        if x.shape in known:
            return function(x)
        known.add(x.shape)
        # Past its limit of shapes dynamo would go on without compiling.
        with torch._inductor.config.patch(freezing=freezing), torch._dynamo.config.patch(recompile_limit=2**10):
            return function(x)

    return run


def onnx_runtime(net: EarlyExitNet) -> Run:
    """Float32 images [N, C, H, W] on the CPU → logits [N, K], by ONNX Runtime. Raises `ImportError` without it."""
    runtimes.check_installed(runtimes.ONNX_NEEDS)
    return onnx_runtime_run(as_onnx(net))


def openvino(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> Run:
    """As `onnx_runtime`, by OpenVINO, compiled for each batch size; dtype: float32 or bfloat16, of the arithmetic.

    Raises `ImportError` without it, `ValueError` where the processor cannot compute in `dtype` and OpenVINO would take
    another.
    """
    runtimes.check_installed(runtimes.OPENVINO_NEEDS)
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == torch.bfloat16 and "BF16" not in can:
        raise ValueError("bfloat16 needs a CPU with AVX512-BF16 or AMX; OpenVINO would compute in float32 here")
    return openvino_run(as_onnx(net), dtype)


def onnx_runtime_int8(net: EarlyExitNet, images: Tensor) -> Run:
    """As `onnx_runtime`, by its static quantisation to INT8; images: float32 [N, C, H, W], from which ranges are taken.

    Raises `ImportError` without it, `RuntimeError` where it cannot quantise the network.
    """
    runtimes.check_installed(runtimes.ONNX_NEEDS)
    return onnx_runtime_run(_as_int8(net, images))


def openvino_int8(net: EarlyExitNet, images: Tensor) -> Run:
    """As `onnx_runtime_int8`, what ONNX Runtime quantised run by OpenVINO."""
    runtimes.check_installed(("onnxruntime", *runtimes.OPENVINO_NEEDS))
    return openvino_run(_as_int8(net, images))


def _as_int8(net: EarlyExitNet, images: Tensor) -> bytes:
    return quantized([as_onnx(net)], images.numpy())[0]


def onnx_runtime_run(model: bytes) -> Run:
    """As `onnx_runtime`, of a model as `as_onnx` makes it."""
    call = runtimes.onnx_runtime_call(model)
    return lambda x: torch.from_numpy(call(x.numpy())[0])


def openvino_run(model: bytes, dtype: torch.dtype = torch.float32) -> Run:
    """As `openvino`, of a model as `as_onnx` makes it."""
    calls: dict[int, Any] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in calls:
            calls[len(x)] = runtimes.openvino(model, dtype, tuple(x.shape))
        return torch.from_numpy(calls[len(x)]([x.numpy()])[0].copy())

    return run


def as_onnx(net: EarlyExitNet) -> bytes:
    """Images "x" [n, C, H, W] → "logits" [n, K] of the final exit, BatchNorm folded."""
    return runtimes.onnx_model(contiguous(plain(net)), torch.randn(2, *net.input_shape), ["logits"])


def masked(net: EarlyExitNet, dtype: torch.dtype = torch.float32, folded: bool = False) -> Run:
    """The masked loop, the network's eval forward as it is written in PyTorch, by the thresholds that `net` has then.

    Channels-last images [N, C, H, W] in `dtype` → `ExitResult`. folded: with BatchNorm folded, which a user could do.
    """
    loop: Any = copy.deepcopy(net)
    if folded:
        loop.stages = nn.ModuleList(fold_stage(stage, dtype)[0] for stage in loop.stages)
        for head in loop.heads:
            head.convs = fold_stage(head.convs, dtype)[0]
    loop = loop.to(dtype, memory_format=torch.channels_last)
    loop.thresholds = net.thresholds
    return torch.inference_mode()(loop)
