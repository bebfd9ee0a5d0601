"""All ways to run a network on the CPU that are measured against one another."""

from eefast.measure.baselines import Run

from . import (
    batch_condition,
    earlyon_batched,
    eefast_engines,
    int8,
    memory_kept,
    one_by_one,
    one_graph,
    runtime_stages,
    smaller,
    torch_compile_early,
)
from .package_baselines import (
    EAGER,
    EAGER_NCHW,
    MASKED,
    MASKED_FOLDED,
    ONNX_RUNTIME,
    OPENVINO,
    OPENVINO_BFLOAT16,
    TORCH_COMPILE,
)
from .peer import Peer, torch_version

PEERS: tuple[Peer, ...] = (
    *(EAGER, EAGER_NCHW, TORCH_COMPILE, ONNX_RUNTIME, OPENVINO, OPENVINO_BFLOAT16),
    *(one_by_one.PEER, MASKED, MASKED_FOLDED, *batch_condition.PEERS, *torch_compile_early.PEERS),
    *(*one_graph.PEERS, *runtime_stages.PEERS),
    *(*eefast_engines.PEERS, *memory_kept.PEERS),
)
# What decides: the best without exits, and early exit as a user would write it or as it runs fastest elsewhere.
KEY_PEERS: tuple[Peer, ...] = (
    *(EAGER, TORCH_COMPILE, ONNX_RUNTIME, OPENVINO, MASKED, MASKED_FOLDED),
    *(*runtime_stages.PEERS, *eefast_engines.PEERS),
)
# Eight bits beside float32: the best without exits, early exit per stage, eefast.
INT8_PEERS: tuple[Peer, ...] = (ONNX_RUNTIME, OPENVINO, *runtime_stages.PEERS[1:], eefast_engines.RESIDENT, *int8.PEERS)
# Networks of others: the best without exits, those run stage by stage, eefast; what it chooses first, so it plans from
# cold. torch.compile takes minutes for each.
BACKBONE_PEERS: tuple[Peer, ...] = (
    *(ONNX_RUNTIME, OPENVINO, eefast_engines.AUTO, eefast_engines.COMPACT),
    *(peer for peer in runtime_stages.PEERS if peer.family in ("onnxruntime", "openvino")),
)
BACKBONE_INT8_PEERS: tuple[Peer, ...] = (
    *(ONNX_RUNTIME, OPENVINO, eefast_engines.AUTO, int8.ONNX_RUNTIME, int8.OPENVINO, int8.BY_DEFAULT),
)
# Other networks in the place of the one that is measured.
STAND_INS: tuple[Peer, ...] = (smaller.PEER,)
# The same network, whose images do not leave where it asks for.
WHOLE_BATCH: tuple[Peer, ...] = (earlyon_batched.PEER,)
ALL_PEERS = (*PEERS, *STAND_INS, *WHOLE_BATCH)

__all__ = [
    "ALL_PEERS", "BACKBONE_INT8_PEERS", "BACKBONE_PEERS", "EAGER", "EAGER_NCHW", "INT8_PEERS", "KEY_PEERS", "MASKED",
    "MASKED_FOLDED", "ONNX_RUNTIME", "OPENVINO", "OPENVINO_BFLOAT16", "PEERS", "STAND_INS", "TORCH_COMPILE",
    "WHOLE_BATCH", "Peer", "Run", "torch_version",
]  # fmt: skip
