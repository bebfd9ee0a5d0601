"""Static: the plain network by ONNX Runtime, with its defaults, in as many threads as PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eefast.measure.baselines import plain_as_onnx
from eefast.model import EarlyExitNet

from . import export
from .peer import Peer, Run

NEEDS = ("onnx", "onnxruntime")


def prepare(net: EarlyExitNet) -> Run:
    call = session(plain_as_onnx(net))
    return lambda x: torch.from_numpy(call(x.numpy())[0])


def session(model: bytes, adjust: Callable[[Any], object] = lambda options: None) -> export.Call:
    """adjust: changes the session's options, which fix the number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    adjust(options)
    made = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda x: made.run(None, {"x": x})


def describe() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


PEER = Peer("plain, ONNX Runtime", prepare, describe, True, "onnxruntime", needs=NEEDS)
