"""Modules → ONNX → models that ONNX Runtime or OpenVINO runs on the CPU, in as many threads as PyTorch."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

ONNX_NEEDS, OPENVINO_NEEDS = ("onnx", "onnxruntime"), ("onnx", "openvino")
OPENVINO_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}

Call = Callable[[Any], Sequence[Any]]
"""A model with one input: float32 array → its outputs as arrays, which the next call may overwrite."""


def check_installed(needs: Sequence[str]) -> None:
    """`ImportError` naming what to install."""
    missing = [name for name in needs if not find_spec(name)]
    if missing:
        raise ImportError(f"{' and '.join(missing)} not installed: pip install {' '.join(missing)}")


def onnx_model(module: nn.Module, example: Tensor, outputs: Sequence[str]) -> bytes:
    """`module` as ONNX for any batch size: "x", in the layout of `example`, float32 → `outputs` in their order."""
    file = io.BytesIO()
    axes = {name: {0: "n"} for name in ["x", *outputs]}
    with warnings.catch_warnings():
        # The exporter by tracing needs no further package, and announces at every call that it is the older one.
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"input_names": ["x"], "output_names": list(outputs), "dynamic_axes": axes}
        torch.onnx.export(module, (example,), file, dynamo=False, **options)  # type: ignore[arg-type]
    return file.getvalue()


def onnx_runtime(model: bytes, adjust: Callable[[Any], object] = lambda options: None) -> Any:
    """A session. adjust: changes its options, which are the defaults but for the number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    adjust(options)
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def onnx_runtime_call(model: bytes, adjust: Callable[[Any], object] = lambda options: None) -> Call:
    session = onnx_runtime(model, adjust)
    return lambda x: session.run(None, {"x": x})


def openvino(
    model: bytes, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Arrays → outputs, as arrays that the next call overwrites.

    dtype: of the arithmetic, see `OPENVINO_PRECISIONS`. shape: of the only input, by default with any batch size.
    """
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    if shape is not None:
        read.reshape(list(shape))
    precision = {"INFERENCE_PRECISION_HINT": OPENVINO_PRECISIONS[dtype], "EXECUTION_MODE_HINT": "PERFORMANCE"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(read, "CPU", {**precision, **threads})
    request, outputs = compiled.create_infer_request(), range(len(compiled.outputs))

    def call(inputs: Sequence[Any]) -> list[Any]:
        request.infer(list(inputs), share_inputs=True)
        return [request.get_output_tensor(i).data for i in outputs]

    return call
