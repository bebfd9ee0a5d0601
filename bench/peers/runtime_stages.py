"""Early exit: one model of ONNX Runtime or OpenVINO per stage, survivors compacted between them."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch

from eefast.measure import runtimes
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet

from . import export
from .peer import Peer, onnx_runtime_version, openvino_settings

# With the defaults the threads of every session spin after its stage and take the cores from the next stage's, which
# costs more than half of the speed. So sessions either do not spin or share their threads.


def asleep(net: EarlyExitNet) -> Run:
    def adjust(options: Any) -> None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    return export.in_stages(net, [runtimes.onnx_runtime_call(model, adjust) for model in export.stages(net)])


def shared(net: EarlyExitNet) -> Run:
    return export.in_stages(net, [on_shared_threads(model) for model in export.stages(net)])


def on_shared_threads(model: bytes) -> runtimes.Call:
    def adjust(options: Any) -> None:
        options.use_per_session_threads = False

    _shared_threads(torch.get_num_threads())
    return runtimes.onnx_runtime_call(model, adjust)


@cache
def _shared_threads(count: int) -> None:
    """They are made once per process, before the first session that uses them."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    onnxruntime.set_global_thread_pool_sizes(count, 1)


def by_openvino(net: EarlyExitNet) -> Run:
    return export.in_stages(net, [on_openvino(model) for model in export.stages(net)])


def on_openvino(model: bytes) -> runtimes.Call:
    call = runtimes.openvino(model)
    return lambda x: call([x])


def describe_asleep() -> str:
    return f"{onnx_runtime_version()}, threads do not spin"


def describe_shared() -> str:
    return f"{onnx_runtime_version()}, one pool of threads for all stages"


NAME, NEEDS = "ONNX Runtime per stage", runtimes.ONNX_NEEDS
PEERS = (
    Peer(NAME, asleep, describe_asleep, False, "onnxruntime", needs=NEEDS),
    Peer(f"{NAME}, shared threads", shared, describe_shared, False, "onnxruntime shared", needs=NEEDS),
    Peer(
        "OpenVINO per stage", by_openvino, partial(openvino_settings, torch.float32), False, "openvino",
        needs=runtimes.OPENVINO_NEEDS,
    ),
)  # fmt: skip
