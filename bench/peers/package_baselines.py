"""The baselines of `eefast.measure` as peers: without early exits by several runtimes, and the masked loop."""

from __future__ import annotations

from functools import partial

import torch

from eefast.measure import baselines, runtimes
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet

from .peer import Peer, onnx_runtime_version, openvino_settings, torch_version

LAST = torch.channels_last


def compiled(net: EarlyExitNet) -> Run:
    # What was compiled for the network before would count as versions of this one's code.
    torch._dynamo.reset()
    return baselines.compiled(baselines.plain(net))


def inductor_settings() -> str:
    return f"{torch_version()}, inductor, freezing"


def _openvino(name: str, dtype: torch.dtype) -> Peer:
    prepare, describe = partial(baselines.openvino, dtype=dtype), partial(openvino_settings, dtype)
    return Peer(f"plain, {name}", prepare, describe, True, "openvino", dtype, needs=runtimes.OPENVINO_NEEDS)


EAGER = Peer("plain, eager", baselines.eager, torch_version, True, "torch", memory_format=LAST)
EAGER_NCHW = Peer("plain, eager NCHW", baselines.eager_contiguous, torch_version, True, "torch")
TORCH_COMPILE = Peer("plain, torch.compile", compiled, inductor_settings, True, "torch.compile", memory_format=LAST)
ONNX_RUNTIME = Peer(
    "plain, ONNX Runtime", baselines.onnx_runtime, onnx_runtime_version, True, "onnxruntime", needs=runtimes.ONNX_NEEDS
)
OPENVINO = _openvino("OpenVINO", torch.float32)
OPENVINO_BFLOAT16 = _openvino("OpenVINO bfloat16", torch.bfloat16)
MASKED = Peer("masked, PyTorch", baselines.masked, torch_version, False, "torch", memory_format=LAST)
MASKED_FOLDED = Peer(
    "masked, PyTorch folded", partial(baselines.masked, folded=True), torch_version, False, "torch", memory_format=LAST
)
