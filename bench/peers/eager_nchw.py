"""Static: the plain network in eager PyTorch, BatchNorm folded, in PyTorch's own layout instead of channels-last."""

from __future__ import annotations

import torch

from eefast.model import EarlyExitNet

from . import export
from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet) -> Run:
    return torch.inference_mode()(export.folded(net.plain()))


PEER = Peer("plain, eager NCHW", prepare, torch_version, True, "torch")
