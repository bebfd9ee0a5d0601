"""Decide once how a network runs: network, device and wishes → `Plan`, printed as a table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from . import ops
from .fold import fold_stage, pack_conv, pack_head
from .heads import ExitHead
from .model import EarlyExitNet

ENGINES = ("auto", "reference", "compact")

log = logging.getLogger("eefast")


@dataclass(frozen=True)
class StagePlan:
    """One row of the table: what runs for a stage and the exit behind it.

    output_shape: (C, H, W) of the features.
    share: of all stages' MACs.
    kernel: what evaluates the exit; note: how the stage runs.
    """

    output_shape: tuple[int, ...]
    share: float
    kernel: str
    note: str


@dataclass(frozen=True)
class CompactStep:
    """What the compact engine runs for a stage and the exit behind it.

    stage, head_convs: inference copies, features → features.
    conv: weight and bias of the head's last convolution where the exit kernel computes it, else None.
    weight, bias: the head's packed linear, see `eefast.fold.pack_head`.
    flatten: the head reads the whole map instead of its mean.
    """

    stage: nn.Module
    head_convs: nn.Module
    conv: tuple[Tensor, Tensor] | None
    weight: Tensor
    bias: Tensor
    flatten: bool


@dataclass(frozen=True)
class Plan:
    """How a network runs; `print(plan)` shows it.

    engine: "reference" or "compact".
    device, dtype: where and in what the stages run.
    reason: why this engine.
    stages: one row per exit, for the table.
    steps: what the compact engine runs, one per exit; the reference engine runs the network itself.
    """

    engine: str
    device: torch.device
    dtype: torch.dtype
    criterion: str
    reason: str
    stages: tuple[StagePlan, ...]
    steps: tuple[CompactStep, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        titles = ("exit", "features", "MACs", "exit kernel", "stage")
        rows = [titles] + [
            (str(i), "×".join(map(str, s.output_shape)), f"{s.share:.1%}", s.kernel, s.note)
            for i, s in enumerate(self.stages)
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        dtype = str(self.dtype).removeprefix("torch.")
        return "\n".join([f"{self.engine} engine, {self.device}, {dtype}: {self.reason}", *table])


def plan(net: EarlyExitNet, engine: str, dtype: torch.dtype | None) -> Plan:
    """Choose the engine and prepare what it runs.

    An engine asked for by name raises `ValueError` if it cannot run; "auto" falls back and logs once why.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    ops.register_flops()
    weight = next(net.parameters())
    obstacle = _compact_obstacle(net, weight.device)
    if engine == "reference" or (engine == "auto" and obstacle):
        if dtype not in (None, weight.dtype):
            raise ValueError(f"dtype={dtype}: the reference engine runs in the network's own; use net.to({dtype})")
        if obstacle and engine == "auto":
            _log_once(f"engine='auto' runs the reference engine: {obstacle}")
        return _reference(net, weight, obstacle if engine == "auto" and obstacle else "asked for by name")
    if obstacle:
        raise ValueError(f"engine='compact' cannot run: {obstacle}; use engine='reference' or 'auto'")
    reason = "asked for by name" if engine == "compact" else "the first choice"
    return _compact(net, weight.device, dtype or weight.dtype, reason)


def _compact_obstacle(net: EarlyExitNet, device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        return f"the compact engine runs on the CPU and on CUDA devices, the network is on {device}"
    if device.type == "cuda" and ops.TRITON_MISSING:
        return ops.TRITON_MISSING
    if device.type == "cuda" and net.num_classes > ops.MAX_CLASSES_ON_CUDA:
        return f"the Triton exit heads go to {ops.MAX_CLASSES_ON_CUDA} classes, the network has {net.num_classes}"
    for i, head in enumerate(net.heads):
        # A subclass may compute something else than what gets packed.
        if type(head) is not ExitHead:
            return f"the head of exit {i} is a {type(head).__name__}, not an eefast.heads.ExitHead"
    return ""


def _reference(net: EarlyExitNet, weight: Tensor, reason: str) -> Plan:
    rows = [
        StagePlan(cost.feature_shape, share, "PyTorch", "as it stands")
        for cost, share in zip(net.stage_costs, _shares(net), strict=True)
    ]
    return Plan("reference", weight.device, weight.dtype, net.criterion.name, reason, tuple(rows))


def _compact(net: EarlyExitNet, device: torch.device, dtype: torch.dtype, reason: str) -> Plan:
    on_cuda = device.type == "cuda"
    kernel = "Triton" if on_cuda else "C++" if ops.CPP_MISSING is None else "PyTorch"
    if ops.CPP_MISSING and not on_cuda:
        reason += f"; exits run in PyTorch, since the C++ kernels are {ops.CPP_MISSING}"
    rows, steps = [], []
    for stage, head, cost, share in zip(net.stages, net.heads, net.stage_costs, _shares(net), strict=True):
        assert isinstance(head, ExitHead)
        folded, note = fold_stage(stage, dtype)
        # On the CPU PyTorch's convolution is the faster one.
        conv = pack_conv(head.convs[-1], dtype) if len(head.convs) and on_cuda else None
        convs, _ = fold_stage(head.convs[:-1] if conv else head.convs, dtype)
        rows.append(StagePlan(cost.feature_shape, share, kernel + " with conv" * (conv is not None), note))
        steps.append(CompactStep(folded, convs, conv, *pack_head(head), head.kind == "plain"))
    return Plan("compact", device, dtype, net.criterion.name, reason, tuple(rows), tuple(steps))


def _shares(net: EarlyExitNet) -> Sequence[float]:
    total = sum(c.stage_macs for c in net.stage_costs)
    return [c.stage_macs / total for c in net.stage_costs]


@cache
def _log_once(message: str) -> None:
    log.warning(message)
