"""An ONNX model compiled by OpenVINO for the CPU, in the precision asked for and in as many threads as PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

NEEDS = ("onnx", "openvino")
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}

Call = Callable[[Sequence[Any]], Sequence[Any]]
"""Arrays → outputs, as arrays that the next call overwrites."""


def compiled(model: bytes, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None) -> Call:
    """shape: of the only input, by default with any batch size."""
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    if shape is not None:
        read.reshape(list(shape))
    precision = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "EXECUTION_MODE_HINT": "PERFORMANCE"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    made = core.compile_model(read, "CPU", {**precision, **threads})
    request, outputs = made.create_infer_request(), range(len(made.outputs))

    def call(inputs: Sequence[Any]) -> list[Any]:
        request.infer(list(inputs), share_inputs=True)
        return [request.get_output_tensor(i).data for i in outputs]

    return call


def version() -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}"
