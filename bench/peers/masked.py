"""Early exit: the network's own eval forward in eager PyTorch, channels-last, as a user would write it."""

from __future__ import annotations

import copy

import torch

from eefast.model import EarlyExitNet

from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet) -> Run:
    own = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # The copy follows the thresholds of the network.
    own.thresholds = net.thresholds
    return torch.inference_mode()(own)


PEER = Peer("masked, PyTorch", prepare, torch_version, False, "torch", memory_format=torch.channels_last)
