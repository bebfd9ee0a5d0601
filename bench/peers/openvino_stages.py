"""Early exit: one OpenVINO model per stage, held to float32, survivors compacted between them."""

from __future__ import annotations

from functools import partial

import torch

from eefast.model import EarlyExitNet

from . import export
from .openvino_model import NEEDS, compiled
from .openvino_plain import describe
from .peer import Peer, Run


def prepare(net: EarlyExitNet) -> Run:
    def stage(model: bytes) -> export.Call:
        call = compiled(model)
        return lambda x: call([x])

    return export.in_stages(net, [stage(model) for model in export.stages(net)])


PEER = Peer("OpenVINO per stage", prepare, partial(describe, torch.float32), False, "openvino", needs=NEEDS)
