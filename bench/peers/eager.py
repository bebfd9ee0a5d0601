"""Static: the plain network in eager PyTorch, BatchNorm folded, channels-last."""

from __future__ import annotations

import torch
from torch import Tensor

from eefast.fold import fold_stage
from eefast.model import EarlyExitNet

from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet) -> Run:
    plain, _ = fold_stage(net.plain(), torch.float32)

    @torch.inference_mode()
    def run(x: Tensor) -> Tensor:
        return plain(x)

    return run


PEER = Peer("plain, eager", prepare, torch_version, True, "torch", memory_format=torch.channels_last)
