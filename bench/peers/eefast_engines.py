"""eefast's engines, and the resident one restricted to AVX2 or to direct convolution."""

from __future__ import annotations

from functools import partial

import torch

import eefast
from eefast import ops
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet

from .peer import Peer


def prepare(net: EarlyExitNet, engine: str, dtype: torch.dtype) -> Run:
    return eefast.accelerate(net, engine=engine, dtype=dtype, frozen=True)  # as an exported peer is


def describe() -> str:
    return f"eefast {eefast.__version__}, C++ {ops.CPP_MISSING or ops.instruction_set()}"


def _peer(
    name: str,
    engine: str,
    dtype: torch.dtype = torch.float32,
    variable: tuple[str, str] | None = None,
) -> Peer:
    # The library reads its variables when it is loaded, so each of them gets a process.
    family, variables = ("eefast", ()) if variable is None else (f"eefast {variable[1]}", (variable,))
    make = partial(prepare, engine=engine, dtype=dtype)
    return Peer(f"eefast {name}", make, describe, False, family, dtype, variables=variables)


AUTO = _peer("call", "auto")
COMPACT = _peer("compact", "compact")
RESIDENT = _peer("resident", "resident")
PEERS = (
    COMPACT,
    RESIDENT,
    _peer("resident, bfloat16", "resident", torch.bfloat16),
    _peer("resident, avx2", "resident", variable=("EEFAST_ISA", "avx2")),
    _peer("resident, direct", "resident", variable=("EEFAST_CONV", "direct")),
)
