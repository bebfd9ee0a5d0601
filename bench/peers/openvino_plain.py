"""Static: the plain network by OpenVINO, held to float32 or in bfloat16 as it would choose, for every batch size."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from eefast.measure.baselines import plain_as_onnx
from eefast.model import EarlyExitNet

from .openvino_model import NEEDS, PRECISIONS, Call, compiled, version
from .peer import Peer, Run


def prepare(net: EarlyExitNet, dtype: torch.dtype) -> Run:
    """Raises `ValueError` where the processor cannot compute in `dtype` and OpenVINO would take another."""
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == torch.bfloat16 and "BF16" not in can:
        raise ValueError("bfloat16 needs a CPU with AVX512-BF16 or AMX; OpenVINO would compute in float32 here")
    model = plain_as_onnx(net)
    made: dict[int, Call] = {}

    def run(x: Tensor) -> Tensor:
        if len(x) not in made:
            made[len(x)] = compiled(model, dtype, tuple(x.shape))
        return torch.from_numpy(made[len(x)]([x.numpy()])[0].copy())

    return run


def describe(dtype: torch.dtype) -> str:
    return f"{version()}, {PRECISIONS[dtype]}, LATENCY"


def _peer(name: str, dtype: torch.dtype) -> Peer:
    make, say = partial(prepare, dtype=dtype), partial(describe, dtype)
    return Peer(f"plain, {name}", make, say, True, "openvino", dtype, needs=NEEDS)


FLOAT32, BFLOAT16 = _peer("OpenVINO", torch.float32), _peer("OpenVINO bfloat16", torch.bfloat16)
