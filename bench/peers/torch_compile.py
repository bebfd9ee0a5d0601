"""Static: the plain network by torch.compile with frozen weights, compiled anew for every batch size."""

from __future__ import annotations

import torch

from eefast.model import EarlyExitNet
from eefast.planning.folding import fold_stage

from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet) -> Run:
    import torch._inductor.config

    # Freezing makes constants of the weights and lays them out for the processor's convolutions.
    torch._inductor.config.freezing = True
    torch._dynamo.reset()
    plain, _ = fold_stage(net.plain(), torch.float32)
    return torch.no_grad()(torch.compile(plain, dynamic=False))


def describe() -> str:
    return f"{torch_version()}, inductor, freezing"


PEER = Peer("plain, torch.compile", prepare, describe, True, "torch.compile", memory_format=torch.channels_last)
