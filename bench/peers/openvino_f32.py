"""Static: the plain network by OpenVINO, held to float32, compiled for every batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eefast.model import EarlyExitNet

from . import export
from .peer import Peer, Run

NEEDS = ("onnx", "openvino")


def prepare(net: EarlyExitNet) -> Run:
    model, made = export.whole(net), {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in made:
            made[len(x)] = compiled(model, tuple(x.shape))
        return torch.from_numpy(made[len(x)](x.numpy())[0].copy())

    return run


def compiled(model: bytes, shape: tuple[int, ...] | None = None) -> export.Call:
    """shape: of the input, by default with any batch size. Outputs are overwritten by the next call."""
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    if shape is not None:
        read.reshape(list(shape))
    # Left alone it computes in bfloat16 where the processor can.
    precision = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "PERFORMANCE"}
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    made = core.compile_model(read, "CPU", {**precision, **threads})
    request, outputs = made.create_infer_request(), range(len(made.outputs))

    def call(x: Any) -> list[Any]:
        request.infer([x], share_inputs=True)
        return [request.get_output_tensor(i).data for i in outputs]

    return call


def describe() -> str:
    import openvino

    return f"openvino {openvino.__version__.split('-')[0]}, f32, LATENCY"


PEER = Peer("plain, OpenVINO", prepare, describe, True, "openvino", needs=NEEDS)
