"""Early exit: one OpenVINO model per stage, held to float32, survivors compacted between them."""

from __future__ import annotations

from eefast.model import EarlyExitNet

from . import export
from .openvino_f32 import NEEDS, compiled, describe
from .peer import Peer, Run


def prepare(net: EarlyExitNet) -> Run:
    return export.in_stages(net, [compiled(model) for model in export.stages(net)])


PEER = Peer("OpenVINO per stage", prepare, describe, False, "openvino", needs=NEEDS)
