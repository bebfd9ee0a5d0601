"""Stage → the same stage run by OpenVINO, which reads and writes PyTorch's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .onnx_models import OPENVINO_NEEDS, missing, onnx_stage
from .stage import RuntimeStage

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def compiled_model(
    model: bytes, threads: int, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None
) -> Any:
    """dtype: of the arithmetic, see `PRECISIONS`. shape: of the only input, by default with any batch size."""
    import openvino

    core = openvino.Core()
    read = core.read_model(model)
    if shape is not None:
        read.reshape(list(shape))
    precision = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "EXECUTION_MODE_HINT": "PERFORMANCE"}
    return core.compile_model(
        read, "CPU", {**precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )


class OpenVino:
    name, quick = "OpenVINO", True
    _process: int | None = None

    def missing(self) -> str:
        if self._process not in (None, os.getpid()):
            return "it hangs in a process that was forked after it was used; start that by 'spawn' instead"
        return missing(OPENVINO_NEEDS)

    def build(self, stage: nn.Module, example: Tensor, threads: int) -> nn.Module:
        import openvino

        self._process = os.getpid()
        model, shapes = onnx_stage(stage, example)
        # For single images apart: where the size is known, OpenVINO saves up to a tenth of their time.
        single = compiled_model(model, threads, shape=(1, *example.shape[1:]))
        any_number = compiled_model(model, threads)
        # One request serves one call at a time.
        of_single, of_any_number = list[Any](), list[Any]()

        def run(features: Tensor, written: Sequence[Tensor]) -> None:
            compiled, idle = (single, of_single) if len(features) == 1 else (any_number, of_any_number)
            try:
                request = idle.pop()
            except IndexError:
                request = compiled.create_infer_request()
            request.set_input_tensor(openvino.Tensor(features.detach().numpy(), shared_memory=True))
            for i, part in enumerate(written):
                request.set_output_tensor(i, openvino.Tensor(part.detach().numpy(), shared_memory=True))
            request.infer()
            idle.append(request)

        return RuntimeStage(run, stage, example, shapes, self.name)
