"""What a user could run instead: the network without early exits in PyTorch or ONNX Runtime, and the masked loop."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ..model import EarlyExitNet
from ..planning.folding import fold_stage

ONNX_NEEDS = ("onnx", "onnxruntime")

Run = Callable[[Tensor], Any]


def eager(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> Run:
    """Channels-last images [N, C, H, W] in `dtype` → logits [N, K] of the final exit; BatchNorm folded."""
    plain, _ = fold_stage(net.plain(), dtype)
    return torch.inference_mode()(plain)


def compiled(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> Run:
    """As `eager`, by torch.compile with frozen weights, anew for every batch size; seconds to minutes for each."""
    import torch._inductor.config

    plain, _ = fold_stage(net.plain(), dtype)
    function = torch.no_grad()(torch.compile(plain, dynamic=False))
    known: set[torch.Size] = set()

    def run(x: Tensor) -> Any:
        if x.shape in known:
            return function(x)
        known.add(x.shape)
        # Freezing makes constants of the weights and lays them out for the processor's convolutions. Past its limit of
        # shapes dynamo would go on without compiling.
        with torch._inductor.config.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=2**10):
            return function(x)

    return run


def onnx_runtime(net: EarlyExitNet) -> Run:
    """Float32 images [N, C, H, W] on the CPU → logits [N, K], by ONNX Runtime in as many threads as PyTorch.

    Raises `ImportError` naming what to install.
    """
    missing = [name for name in ONNX_NEEDS if not find_spec(name)]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(plain_as_onnx(net), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def plain_as_onnx(net: EarlyExitNet) -> bytes:
    """Images "x" [n, C, H, W] → "logits" [n, K] of the final exit, BatchNorm folded."""
    plain: nn.Module = fold_stage(net.plain(), torch.float32)[0]
    plain = plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return onnx_model(plain, torch.randn(2, *net.input_shape), ["logits"])


def masked(net: EarlyExitNet, dtype: torch.dtype = torch.float32) -> Run:
    """Channels-last images [N, C, H, W] in `dtype` → `ExitResult`; the network's own eval forward, as it is written."""
    return torch.inference_mode()(copy.deepcopy(net).to(dtype, memory_format=torch.channels_last))  # type: ignore[call-overload]


def onnx_model(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> bytes:
    """`module` as ONNX for any batch size: "x", laid out as `example` [n, …], float32 → `outputs` in their order."""
    file = io.BytesIO()
    axes = {name: {0: "n"} for name in ["x", *outputs]}
    with warnings.catch_warnings():
        # The exporter by tracing needs no package of its own, and announces at every call that it is the older one.
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"input_names": ["x"], "output_names": list(outputs), "dynamic_axes": axes}
        torch.onnx.export(module, (example,), file, dynamo=False, **options)  # type: ignore[arg-type]
    return file.getvalue()
