"""Static: the plain network in eager PyTorch, BatchNorm folded, channels-last."""

from __future__ import annotations

import torch

from eefast.measure import baselines

from .peer import Peer, torch_version

prepare = baselines.eager
PEER = Peer("plain, eager", prepare, torch_version, True, "torch", memory_format=torch.channels_last)
