"""Early exit: one ONNX Runtime session per stage, survivors compacted between them; two ways to share the cores."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from eefast.model import EarlyExitNet

from . import export
from .onnx_runtime import NEEDS, describe, session
from .peer import Peer, Run

# With the defaults the threads of every session spin after its stage and take the cores from the next stage's, which
# costs more than half of the speed. So sessions either do not spin or share their threads.


def asleep(net: EarlyExitNet) -> Run:
    def adjust(options: Any) -> None:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    return export.in_stages(net, [session(model, adjust) for model in export.stages(net)])


def shared(net: EarlyExitNet) -> Run:
    def adjust(options: Any) -> None:
        options.use_per_session_threads = False

    _shared_threads(torch.get_num_threads())
    return export.in_stages(net, [session(model, adjust) for model in export.stages(net)])


@cache
def _shared_threads(count: int) -> None:
    """They are made once per process, before the first session that uses them."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    onnxruntime.set_global_thread_pool_sizes(count, 1)


def describe_asleep() -> str:
    return f"{describe()}, threads do not spin"


def describe_shared() -> str:
    return f"{describe()}, one pool of threads for all stages"


PEERS = (
    Peer("ONNX Runtime per stage", asleep, describe_asleep, False, "onnxruntime", needs=NEEDS),
    Peer("ONNX Runtime per stage, shared threads", shared, describe_shared, False, "onnxruntime shared", needs=NEEDS),
)
