"""Early exit as in BatchCond on the CPU: padded, split, or as a table decides, made for each batch size."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from eefast.model import EarlyExitNet
from eefast.result import ExitResult

from . import batch_condition
from .peer import Peer, Run, torch_version


def prepare(net: EarlyExitNet, mode: str) -> Run:
    made: dict[int, Run] = {}

    def run(x: Tensor) -> ExitResult:
        if len(x) not in made:
            made[len(x)] = batch_condition.prepare(net, mode, torch.float32, len(x))
        return made[len(x)](x)  # type: ignore[no-any-return]

    return run


PEERS = tuple(
    Peer(
        f"BatchCond, {mode}",
        partial(prepare, mode=mode),
        torch_version,
        False,
        "torch",
        memory_format=torch.channels_last,
    )
    for mode in batch_condition.MODES
)
