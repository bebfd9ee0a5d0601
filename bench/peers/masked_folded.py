"""Early exit: the network's own eval forward in eager PyTorch, BatchNorm folded, channels-last."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage

from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet) -> Run:
    own = copy.deepcopy(net)
    own.stages = nn.ModuleList(fold_stage(stage, torch.float32)[0] for stage in own.stages)
    head: Any
    for head in own.heads:
        head.convs = fold_stage(head.convs, torch.float32)[0]
    # The copy follows the thresholds of the network.
    own.thresholds = net.thresholds
    return torch.inference_mode()(own)


PEER = Peer("masked, PyTorch folded", prepare, torch_version, False, "torch", memory_format=torch.channels_last)
