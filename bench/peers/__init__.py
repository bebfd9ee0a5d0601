"""All ways to run a network on the CPU that are measured against one another; one file per peer."""

from . import (
    batch_condition_cpu,
    eager,
    eager_nchw,
    earlyon_batched,
    eefast_engines,
    masked,
    masked_folded,
    memory_kept,
    one_by_one,
    one_graph,
    onnx_runtime,
    onnx_runtime_stages,
    openvino_plain,
    openvino_stages,
    smaller,
    torch_compile,
    torch_compile_early,
)
from .peer import Peer, Run, torch_version

PEERS: tuple[Peer, ...] = (
    *(eager.PEER, eager_nchw.PEER, torch_compile.PEER, onnx_runtime.PEER),
    *(openvino_plain.FLOAT32, openvino_plain.BFLOAT16),
    *(one_by_one.PEER, masked.PEER, masked_folded.PEER, *batch_condition_cpu.PEERS, *torch_compile_early.PEERS),
    *(*one_graph.PEERS, *onnx_runtime_stages.PEERS, openvino_stages.PEER),
    *(*eefast_engines.PEERS, *memory_kept.PEERS),
)
# What decides: the best without exits, and early exit as a user would write it or as it runs fastest elsewhere.
KEY_PEERS: tuple[Peer, ...] = (
    *(eager.PEER, torch_compile.PEER, onnx_runtime.PEER, openvino_plain.FLOAT32, masked.PEER, masked_folded.PEER),
    *(*onnx_runtime_stages.PEERS, openvino_stages.PEER, *eefast_engines.PEERS),
)
# Other networks in the place of the one that is measured.
STAND_INS: tuple[Peer, ...] = (smaller.PEER,)
# The same network, whose images do not leave where it asks for.
WHOLE_BATCH: tuple[Peer, ...] = (earlyon_batched.PEER,)
ALL_PEERS = (*PEERS, *STAND_INS, *WHOLE_BATCH)

__all__ = ["ALL_PEERS", "KEY_PEERS", "PEERS", "STAND_INS", "WHOLE_BATCH", "Peer", "Run", "torch_version"]
