"""Static: the plain network by OpenVINO in bfloat16, as it would choose by itself, compiled for every batch size."""

from __future__ import annotations

import torch
from torch import Tensor

from eefast.model import EarlyExitNet

from . import export
from .openvino_model import NEEDS, Call, compiled, version
from .peer import Peer, Run


def prepare(net: EarlyExitNet) -> Run:
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in can:
        raise ValueError("bfloat16 needs a CPU with AVX512-BF16 or AMX; OpenVINO would compute in float32 here")
    model = export.whole(net)
    made: dict[int, Call] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in made:
            made[len(x)] = compiled(model, torch.bfloat16, tuple(x.shape))
        return torch.from_numpy(made[len(x)]([x.numpy()])[0].copy())

    return run


def describe() -> str:
    return f"{version()}, bf16, LATENCY"


PEER = Peer("plain, OpenVINO bfloat16", prepare, describe, True, "openvino", torch.bfloat16, needs=NEEDS)
