"""Other libraries that run a stage: a module and features → a stage with the same answers, see `stage.Runtime`."""

from .compiled import Compiled
from .onnx_models import ONNX_NEEDS, OPENVINO_NEEDS, exported_once, missing, onnx_model
from .onnx_sessions import OnnxRuntime
from .openvino_requests import OpenVino
from .stage import Runtime, RuntimeStage
from .stage_and_head import StageAndHead

RUNTIMES: dict[str, Runtime] = {"onnxruntime": OnnxRuntime(), "openvino": OpenVino(), "compile": Compiled()}
"""By the name that `accelerate(stages=...)` takes."""

__all__ = [
    "ONNX_NEEDS", "OPENVINO_NEEDS", "RUNTIMES", "Compiled", "OnnxRuntime", "OpenVino", "Runtime", "RuntimeStage",
    "StageAndHead", "exported_once", "missing", "onnx_model",
]  # fmt: skip
