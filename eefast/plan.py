"""Decide once how a network runs: network, device and wishes → `Plan`, printed as a table."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, tune
from .fold import fold_stage, pack_conv, pack_head
from .fuse import IndexedStage, device_counted, fastest_stage
from .heads import ExitHead
from .lower import Lowered, ResidentProgram, UnsupportedError, cuda_program, lower
from .model import EarlyExitNet

ENGINES = ("auto", "reference", "compact", "resident")

CACHEABLE_MEGABYTES = 128
"""Float32 weights up to which "auto" considers the resident engine; it was faster up to there (EENet-50)."""

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
    counted: the stage in a form that reads the number of its rows on the device, see `eefast.fuse.indexed_stage`.
    """

    stage: nn.Module
    head_convs: nn.Module
    conv: tuple[Tensor, Tensor] | None
    weight: Tensor
    bias: Tensor
    flatten: bool
    counted: IndexedStage | None = None


@dataclass(frozen=True)
class Plan:
    """How a network runs; `print(plan)` shows it.

    engine: "reference", "compact" or "resident".
    device, dtype: where and in what the stages run.
    reason: why this engine.
    stages: one row per exit, for the table.
    steps: what the compact engine runs, one per exit; the reference engine runs the network itself.
    program: what the resident engine runs.
    max_batch, graphs: images for which the compact engine has CUDA graphs, and these, see `eefast.engines.graphs`.
    """

    engine: str
    device: torch.device
    dtype: torch.dtype
    criterion: str
    reason: str
    stages: tuple[StagePlan, ...]
    steps: tuple[CompactStep, ...] = field(default=(), repr=False)
    max_batch: int = 256
    program: ResidentProgram | None = field(default=None, repr=False)
    graphs: Any = field(default=None, repr=False)

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


Run = Callable[[Plan, EarlyExitNet, Tensor], Any]
Capture = Callable[[Plan, EarlyExitNet, Tensor | None], Plan]


def plan(
    net: EarlyExitNet,
    engine: str,
    dtype: torch.dtype | None,
    example: Tensor | None = None,
    run: Mapping[str, Run] | None = None,
    capture: Capture | None = None,
    max_batch: int = 256,
) -> Plan:
    """Choose the engine and prepare what it runs.

    example: prepared images to measure on, by default noise. run: the engines, to be measured where more than one can
    run; without them "auto" takes the first that can. capture: adds CUDA graphs, for up to `max_batch` images, to a
    plan of the compact engine.
    An engine asked for by name raises `ValueError` if it cannot run; "auto" falls back and logs once why.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    ops.register_flops()
    weight = next(net.parameters())
    wanted = dtype or weight.dtype
    if engine == "reference":
        return _reference(net, weight, dtype, "asked for by name")
    if engine in ("auto", "resident"):
        lowered, why_not = _lowered(net, weight, wanted)
        if engine == "resident":
            if lowered is None:
                raise ValueError(f"engine='resident' cannot run: {why_not}; use engine='compact' or 'auto'")
            return _resident(net, weight.device, lowered, wanted, example, "asked for by name")
    obstacle = _compact_obstacle(net, weight.device)

    def compact(reason: str) -> Plan:
        made = replace(_compact(net, weight.device, wanted, example, reason), max_batch=max_batch)
        return made if capture is None else capture(made, net, example)

    if engine == "compact":
        if obstacle:
            raise ValueError(f"engine='compact' cannot run: {obstacle}; use engine='reference' or 'auto'")
        return compact("asked for by name")
    if lowered is None and obstacle:
        _log_once(f"engine='auto' runs the reference engine: {obstacle}")
        return _reference(net, weight, dtype, obstacle)
    if lowered is None:
        return compact(f"the resident engine cannot run: {why_not}")
    megabytes = lowered.weights.nbytes / 1e6
    if not obstacle and megabytes > CACHEABLE_MEGABYTES:
        why_not = f"weights of {megabytes:.0f} MB are more than what caches hold, so the resident engine was not tried"
        return compact(why_not)
    resident = _resident(net, weight.device, lowered, wanted, example, "the first choice")
    return resident if obstacle or run is None else _faster(net, lowered, resident, compact, example, run)


def _compact_obstacle(net: EarlyExitNet, device: torch.device) -> str:
    if device.type not in ("cpu", "cuda"):
        return f"the compact engine runs on the CPU and on CUDA devices, the network is on {device}"
    if device.type == "cuda" and not ops.exit_kernels():
        return f"{ops.TRITON_MISSING}, and the CUDA kernels are {ops.CUDA_MISSING}"
    if device.type == "cuda" and net.num_classes > ops.MAX_CLASSES_ON_CUDA:
        return f"the Triton exit heads go to {ops.MAX_CLASSES_ON_CUDA} classes, the network has {net.num_classes}"
    for i, head in enumerate(net.heads):
        # A subclass may compute something else than what gets packed.
        if type(head) is not ExitHead:
            return f"the head of exit {i} is a {type(head).__name__}, not an eefast.heads.ExitHead"
    return ""


def _lowered(net: EarlyExitNet, weight: Tensor, dtype: torch.dtype) -> tuple[Lowered | None, str]:
    """The network as the resident engine's layers, or None and why that is impossible."""
    if weight.device.type == "cuda":
        return _lowered_for_cuda(net, dtype)
    if weight.device.type != "cpu":
        return None, f"it runs on the CPU and on CUDA devices, the network is on {weight.device}"
    if ops.CPP_MISSING:
        return None, f"its C++ kernels are {ops.CPP_MISSING}"
    if dtype == torch.bfloat16 and ops.instruction_set() != "avx512_bf16":
        return None, f"in bfloat16 it needs AVX512-BF16, but the instruction set is {ops.instruction_set()}"
    if dtype not in (torch.float32, torch.bfloat16):
        return None, f"it computes in float32 or bfloat16, not in {dtype}"
    try:
        return lower(net), ""
    except UnsupportedError as error:
        return None, str(error)


def _lowered_for_cuda(net: EarlyExitNet, dtype: torch.dtype) -> tuple[Lowered | None, str]:
    if ops.CUDA_MISSING:
        return None, f"its CUDA kernels are {ops.CUDA_MISSING}"
    if dtype not in (torch.float16, torch.bfloat16):
        return None, f"on CUDA it computes in float16 or bfloat16, not in {dtype}; pass dtype=torch.float16"
    if max(net.input_shape[1:]) > 32:
        return None, f"its CUDA kernel takes images of up to 32×32, not {net.input_shape[1]}×{net.input_shape[2]}"
    try:
        lowered = lower(copy.deepcopy(net).cpu())
        _shared_memory(net, cuda_program(lowered, dtype, torch.device("cpu")))
    except (UnsupportedError, RuntimeError) as error:
        return None, str(error)
    return lowered, ""


def _shared_memory(net: EarlyExitNet, p: ResidentProgram) -> int:
    """Bytes that the CUDA kernel needs for the maps; `RuntimeError` where it lacks a step."""
    tables = p.steps, p.maps, p.groups, p.packed, net.thresholds
    image = torch.empty(0, *net.input_shape)
    return ops.resident_shared_memory(image, *tables, net.criterion.name, net.num_classes, p.bfloat16)


def _resident(
    net: EarlyExitNet, device: torch.device, lowered: Lowered, dtype: torch.dtype, example: Tensor | None, reason: str
) -> Plan:
    if device.type == "cuda":
        return _resident_on_cuda(net, device, lowered, dtype, reason)
    program, note = tune.tune(net, lowered, dtype == torch.bfloat16, tune.example(net, example))
    kernel = f"C++, {ops.instruction_set().replace('_', '-')}"
    rows, begin = [], 0
    for cost, share, end in zip(net.stage_costs, _shares(net), lowered.exit_sections, strict=True):
        how = ", ".join(_how(lowered, program, section) for section in range(begin, end + 1))
        rows.append(StagePlan(cost.feature_shape, share, kernel, how))
        begin = end
    reason = f"{reason}; {note}" if note else reason
    return Plan("resident", device, dtype, net.criterion.name, reason, tuple(rows), program=program)


def _resident_on_cuda(
    net: EarlyExitNet, device: torch.device, lowered: Lowered, dtype: torch.dtype, reason: str
) -> Plan:
    program = replace(cuda_program(lowered, dtype, device), normalization=_normalization(net, device))
    rows, begin = [], 0
    for cost, share, end in zip(net.stage_costs, _shares(net), lowered.exit_sections, strict=True):
        how = ", ".join(f"{h}×{w}" for h, w in lowered.sizes[begin : end + 1])
        rows.append(StagePlan(cost.feature_shape, share, "in the kernel", how))
        begin = end
    kilobytes = _shared_memory(net, program) / 1024
    reason = f"{reason}; one kernel for the whole network, {kilobytes:.0f} KiB of shared memory per image in work"
    return Plan("resident", device, dtype, net.criterion.name, reason, tuple(rows), program=program)


def _normalization(net: EarlyExitNet, device: torch.device) -> Tensor | None:
    """[2, C] scale and shift that make of uint8 pixels what `net.prepare` makes of them."""
    if net.normalization is None:
        return None
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in net.normalization)
    return torch.stack([1 / (255 * std), -mean / std]).to(device, torch.float32)


def _how(lowered: Lowered, program: ResidentProgram, section: int) -> str:
    """How a section runs, for instance "16×16 F(4×4) by 4": map size, Winograd tiles, samples that go together."""
    size, side, group = lowered.sizes[section], program.algorithms[section], program.group_sizes[section]
    algorithm = f"F({side}×{side})" if side else "direct"
    return f"{size[0]}×{size[1]} {algorithm}" + (f" by {group}" if group > 1 else "")


_speeds: dict[Any, tuple[float, float]] = {}


def _faster(
    net: EarlyExitNet,
    lowered: Lowered,
    resident: Plan,
    make_compact: Callable[[str], Plan],
    example: Tensor | None,
    run: Mapping[str, Run],
) -> Plan:
    """The faster of the resident and the compact engine, measured on images that all go to the final exit."""
    key = lowered.geometry, resident.device, resident.dtype, ops.instruction_set(), torch.get_num_threads()
    device = resident.device
    # A GPU needs more to be busy.
    images = torch.cat([tune.example(net, example)] * (32 if device.type == "cuda" else 2)).to(device)
    compact: Plan | None = None
    if key not in _speeds:
        compact = make_compact("the first choice")
        probe = copy.copy(net)
        probe._buffers = {**net._buffers, "thresholds": tune.thresholds(net, net.num_exits).to(device)}

        def answer(p: Plan) -> None:
            run[p.engine](p, probe, images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        _speeds[key] = tuple(tune.fastest_of([partial(answer, p) for p in (resident, compact)]))  # type: ignore[assignment]
    own, other = (1e3 * seconds for seconds in _speeds[key])
    faster, slower = ("resident", "compact") if own <= other else ("compact", "resident")
    low, high = sorted((own, other))
    reason = f"{high / low:.1f}× as fast as {slower} ({len(images)} images to the final exit: {low:.1f} ms, {high:.1f})"
    chosen = resident if faster == "resident" else compact or make_compact("the first choice")
    return replace(chosen, reason=chosen.reason.replace("the first choice", reason))


def _reference(net: EarlyExitNet, weight: Tensor, dtype: torch.dtype | None, reason: str) -> Plan:
    if dtype not in (None, weight.dtype):
        raise ValueError(f"dtype={dtype}: the reference engine runs in the network's own; use net.to({dtype})")
    rows = [
        StagePlan(cost.feature_shape, share, "PyTorch", "as it stands")
        for cost, share in zip(net.stage_costs, _shares(net), strict=True)
    ]
    return Plan("reference", weight.device, weight.dtype, net.criterion.name, reason, tuple(rows))


def _compact(net: EarlyExitNet, device: torch.device, dtype: torch.dtype, example: Tensor | None, reason: str) -> Plan:
    on_cuda = device.type == "cuda"
    triton = on_cuda and ops.exit_kernels() == "triton"
    kernel = "Triton" if triton else "CUDA" if on_cuda else "C++" if ops.CPP_MISSING is None else "PyTorch"
    if ops.CPP_MISSING and not on_cuda:
        reason = f"{reason}; exits run in PyTorch, since the C++ kernels are {ops.CPP_MISSING}"
    rows, steps = [], []
    # The network's own device: tests plan for a GPU that is not there.
    example = torch.cat([tune.example(net, example)] * 4).to(next(net.parameters()).device, dtype)
    features = example if on_cuda else None
    for stage, head, cost, share in zip(net.stages, net.heads, net.stage_costs, _shares(net), strict=True):
        assert isinstance(head, ExitHead)
        counted = None
        if features is None:
            folded, note = fold_stage(stage, dtype)
        else:
            folded, note = fastest_stage(stage, dtype, features)
            features = folded(features)
            # Convolutions of a head would run on the dead rows, too.
            counted = device_counted(stage, dtype) if triton and len(head.convs) < 2 else None
        # On the CPU PyTorch's convolution is the faster one; in CUDA C++ there is none.
        conv = pack_conv(head.convs[-1], dtype) if len(head.convs) and triton else None
        convs, _ = fold_stage(head.convs[:-1] if conv else head.convs, dtype)
        rows.append(StagePlan(cost.feature_shape, share, kernel + " with conv" * (conv is not None), note))
        steps.append(CompactStep(folded, convs, conv, *pack_head(head), head.kind == "plain", counted))
    return Plan("compact", device, dtype, net.criterion.name, reason, tuple(rows), tuple(steps))


def _shares(net: EarlyExitNet) -> Sequence[float]:
    total = sum(c.stage_macs for c in net.stage_costs)
    return [c.stage_macs / total for c in net.stage_costs]


@cache
def _log_once(message: str) -> None:
    log.warning(message)
