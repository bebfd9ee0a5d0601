"""All ways to run a network on the CPU that are measured against one another; one file per peer."""

from . import (
    eager,
    eefast_engines,
    masked,
    masked_folded,
    onnx_runtime,
    onnx_runtime_stages,
    openvino_f32,
    openvino_stages,
    torch_compile,
)
from .peer import Peer, Run, torch_version

PEERS: tuple[Peer, ...] = (
    *(eager.PEER, torch_compile.PEER, onnx_runtime.PEER, openvino_f32.PEER),
    *(masked.PEER, masked_folded.PEER, *onnx_runtime_stages.PEERS, openvino_stages.PEER),
    *eefast_engines.PEERS,
)

__all__ = ["PEERS", "Peer", "Run", "torch_version"]
