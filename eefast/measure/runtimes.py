"""ONNX models → calls of ONNX Runtime or OpenVINO on the CPU, in as many threads as PyTorch, as a user would write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..runtimes.onnx_models import ONNX_NEEDS, OPENVINO_NEEDS, missing, onnx_model
from ..runtimes.onnx_sessions import session
from ..runtimes.openvino_requests import PRECISIONS as OPENVINO_PRECISIONS
from ..runtimes.openvino_requests import compiled_model

__all__ = [
    "ONNX_NEEDS", "OPENVINO_NEEDS", "OPENVINO_PRECISIONS", "Call", "check_installed", "missing", "onnx_model",
    "onnx_runtime", "onnx_runtime_call", "openvino",
]  # fmt: skip

Call = Callable[[Any], Sequence[Any]]
"""A model with one input: float32 array → its outputs as arrays, which the next call may overwrite."""


def check_installed(needs: Sequence[str]) -> None:
    """`ImportError` naming what to install."""
    if reason := missing(needs):
        raise ImportError(reason)


def onnx_runtime(model: bytes, adjust: Callable[[Any], object] = lambda options: None) -> Any:
    """A session, see `runtimes.onnx_sessions.session`."""
    return session(model, torch.get_num_threads(), adjust)


def onnx_runtime_call(model: bytes, adjust: Callable[[Any], object] = lambda options: None) -> Call:
    made = onnx_runtime(model, adjust)
    return lambda x: made.run(None, {"x": x})


def openvino(
    model: bytes, dtype: torch.dtype = torch.float32, shape: Sequence[int] | None = None
) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Arrays → outputs, as arrays that the next call overwrites.

    dtype: of the arithmetic, see `OPENVINO_PRECISIONS`. shape: of the only input, by default with any batch size.
    """
    compiled = compiled_model(model, torch.get_num_threads(), dtype, shape)
    request, outputs = compiled.create_infer_request(), range(len(compiled.outputs))

    def call(inputs: Sequence[Any]) -> list[Any]:
        request.infer(list(inputs), share_inputs=True)
        return [request.get_output_tensor(i).data for i in outputs]

    return call
