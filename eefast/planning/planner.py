"""Decide once how a network runs: network, device and wishes → `Plan`, printed as a table."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..heads import ExitHead
from ..model import EarlyExitNet
from . import layers, trial, tuning
from .errors import UnsupportedError
from .folding import fold_stage
from .head_packing import pack_conv, pack_head
from .indexed_stages import IndexedStage, device_counted
from .inference_copies import channels_last, inference_copy
from .layers import Lowered
from .lowering import lower
from .packing import ResidentProgram, cuda_program
from .stage_choice import fastest_stage

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
    weight, bias: the head's packed linear, see `eefast.planning.head_packing.pack_head`.
    flatten: the head reads the whole map instead of its mean.
    counted: the stage in a form that reads the number of its rows on the device, see `planning.indexed_stages`.
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
    Whatever an engine would run is first tried on a few images against the network's own answers, see `planning.trial`.
    An engine asked for by name raises `ValueError` if it cannot run; "auto" falls back and logs once why.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; choose one of {', '.join(ENGINES)}")
    # Tensors made in inference mode could not be used outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return _plan(net, engine, dtype, example, run, capture, max_batch)


def _plan(
    net: EarlyExitNet,
    engine: str,
    dtype: torch.dtype | None,
    example: Tensor | None,
    run: Mapping[str, Run] | None,
    capture: Capture | None,
    max_batch: int,
) -> Plan:
    ops.register_flops()
    weight = next(net.parameters())
    wanted = dtype or weight.dtype
    _check_classes(net)
    if engine == "reference":
        return _reference(net, weight, dtype, "asked for by name")
    # Noise, since images that are alike would not show what depends on the batch.
    noise = tuning.example(net, None)
    trial.check_modes(net, noise)
    try:
        expected = _expected(net, weight.device, noise)
    except UnsupportedError as obstacle:
        if engine != "auto":
            raise _refused(engine, obstacle, "reference") from obstacle
        return _fallen_back(net, weight, dtype, obstacle)

    def compact(reason: str) -> Plan:
        obstacle = _compact_obstacle(net, weight.device)
        if obstacle:
            raise UnsupportedError(obstacle)
        with _exceptions_as_obstacles():
            made = replace(_compact(net, weight.device, wanted, example, expected, reason), max_batch=max_batch)
        return made if capture is None else capture(made, net, example)

    if engine == "compact":
        try:
            return compact("asked for by name")
        except UnsupportedError as obstacle:
            raise _refused(engine, obstacle, "reference") from obstacle
    reason = "asked for by name" if engine == "resident" else "the first choice"
    try:
        with _exceptions_as_obstacles():
            lowered = _lowered(net, weight, wanted, expected)
            megabytes = lowered.weights.nbytes / 1e6
            if engine == "auto" and not _compact_obstacle(net, weight.device) and megabytes > CACHEABLE_MEGABYTES:
                raise _TooLargeError(megabytes)
            resident = _resident(net, weight.device, lowered, wanted, example, expected, reason)
    except UnsupportedError as why_not:
        if engine == "resident":
            raise _refused(engine, why_not, "compact") from why_not
        try:
            return compact(
                str(why_not) if isinstance(why_not, _TooLargeError) else f"the resident engine cannot run: {why_not}"
            )
        except UnsupportedError as obstacle:
            return _fallen_back(net, weight, dtype, obstacle)
    return resident if engine == "resident" or run is None else _faster(net, lowered, resident, compact, example, run)


@contextmanager
def _exceptions_as_obstacles() -> Iterator[None]:
    """Errors in arguments and settings, which are ValueErrors, come through."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # a first run raises whatever it does
        raise UnsupportedError(trial.brief(error)) from error


class _TooLargeError(UnsupportedError):
    def __init__(self, megabytes: float) -> None:
        what = f"weights of {megabytes:.0f} MB are more than what caches hold"
        super().__init__(f"{what}, so the resident engine was not tried")


def _refused(engine: str, obstacle: Exception, other: str) -> ValueError:
    return ValueError(f"engine={engine!r} cannot run: {obstacle}; use engine={other!r} or 'auto'")


def _fallen_back(net: EarlyExitNet, weight: Tensor, dtype: torch.dtype | None, obstacle: Exception) -> Plan:
    _log_once(f"engine='auto' runs the reference engine: {obstacle}")
    return _reference(net, weight, dtype, str(obstacle))


def _check_classes(net: EarlyExitNet) -> None:
    for i, head in enumerate(net.heads):
        net.check_classes(i, getattr(getattr(head, "classifier", None), "out_features", net.num_classes))


def _expected(net: EarlyExitNet, device: torch.device, noise: Tensor) -> tuple[trial.Expected, ...]:
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"engines run on the CPU and on CUDA devices, the network is on {device}")
    return trial.expected(net, noise)


def _compact_obstacle(net: EarlyExitNet, device: torch.device) -> str:
    if device.type == "cuda" and not ops.exit_kernels():
        return f"{ops.TRITON_MISSING}, and the CUDA kernels are {ops.CUDA_MISSING}"
    if device.type == "cuda" and net.num_classes > ops.MAX_CLASSES_ON_CUDA:
        return f"the Triton exit heads go to {ops.MAX_CLASSES_ON_CUDA} classes, the network has {net.num_classes}"
    return ""


def _lowered(net: EarlyExitNet, weight: Tensor, dtype: torch.dtype, expected: Sequence[trial.Expected]) -> Lowered:
    """The network as the resident engine's layers; `UnsupportedError` says why that is impossible."""
    if weight.device.type == "cuda":
        lowered = _lowered_for_cuda(net, dtype)
    elif ops.CPP_MISSING:
        raise UnsupportedError(f"its C++ kernels are {ops.CPP_MISSING}")
    elif dtype == torch.bfloat16 and ops.instruction_set() != "avx512_bf16":
        raise UnsupportedError(f"in bfloat16 it needs AVX512-BF16, but the instruction set is {ops.instruction_set()}")
    elif dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"it computes in float32 or bfloat16, not in {dtype}")
    else:
        lowered = lower(net)
    found = layers.answers(lowered, expected[0].seen.cpu())
    for i, (rows, wanted) in enumerate(zip(found, expected, strict=True)):
        if reason := trial.difference(rows, wanted.rows.cpu(), trial.tolerance(torch.float32, weight.device)):
            raise UnsupportedError(f"as its steps, the network's {reason} at exit {i}")
    return lowered


def _lowered_for_cuda(net: EarlyExitNet, dtype: torch.dtype) -> Lowered:
    if ops.CUDA_MISSING:
        raise UnsupportedError(f"its CUDA kernels are {ops.CUDA_MISSING}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"on CUDA it computes in float16 or bfloat16, not in {dtype}; pass dtype=torch.float16")
    if max(net.input_shape[1:]) > 32:
        height, width = net.input_shape[1:]
        raise UnsupportedError(f"its CUDA kernel takes images of up to 32×32, not {height}×{width}")
    lowered = lower(net)
    try:
        _shared_memory(net, cuda_program(lowered, dtype, torch.device("cpu")))
    except RuntimeError as error:
        raise UnsupportedError(str(error)) from error
    return lowered


def _shared_memory(net: EarlyExitNet, p: ResidentProgram) -> int:
    """Bytes that the CUDA kernel needs for the maps; `RuntimeError` where it lacks a step."""
    tables = p.steps, p.maps, p.groups, p.packed, net.thresholds
    image = torch.empty(0, *net.input_shape)
    return ops.resident_shared_memory(image, *tables, net.criterion.name, net.num_classes, p.bfloat16)


def _resident(
    net: EarlyExitNet,
    device: torch.device,
    lowered: Lowered,
    dtype: torch.dtype,
    example: Tensor | None,
    expected: Sequence[trial.Expected],
    reason: str,
) -> Plan:
    if device.type == "cuda":
        return _resident_on_cuda(net, device, lowered, dtype, reason)
    program, note = tuning.tune(net, lowered, dtype == torch.bfloat16, tuning.example(net, example))
    allowed = trial.tolerance(dtype, device)
    found = tuning.all_logits(net, program, expected[0].seen.float())
    for i, (logits, wanted) in enumerate(zip(found, expected, strict=True)):
        if different := trial.difference(logits, wanted.rows[:, :-1], allowed):
            raise UnsupportedError(f"its {different} at exit {i}")
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
    images = torch.cat([tuning.example(net, example)] * (32 if device.type == "cuda" else 2)).to(device)
    compact: Plan | None = None
    try:
        if key not in _speeds or _speeds[key][0] > _speeds[key][1]:
            compact = make_compact("the first choice")
    except UnsupportedError as error:
        why = f"the compact engine cannot run: {error}"
        return replace(resident, reason=resident.reason.replace("the first choice", why))
    if key not in _speeds:
        assert compact is not None
        probe = copy.copy(net)
        probe._buffers = {**net._buffers, "thresholds": tuning.thresholds(net, net.num_exits).to(device)}

        def answer(p: Plan) -> None:
            run[p.engine](p, probe, images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        _speeds[key] = tuple(tuning.fastest_of([partial(answer, p) for p in (resident, compact)]))  # type: ignore[assignment]
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


def _compact(
    net: EarlyExitNet,
    device: torch.device,
    dtype: torch.dtype,
    example: Tensor | None,
    expected: Sequence[trial.Expected],
    reason: str,
) -> Plan:
    on_cuda = device.type == "cuda"
    triton = on_cuda and ops.exit_kernels() == "triton"
    kernel = "Triton" if triton else "CUDA" if on_cuda else "C++" if ops.CPP_MISSING is None else "PyTorch"
    if ops.CPP_MISSING and not on_cuda:
        reason = f"{reason}; exits run in PyTorch, since the C++ kernels are {ops.CPP_MISSING}"
    rows, steps = [], []
    # The network's own device: tests plan for a GPU that is not there.
    example = torch.cat([tuning.example(net, example)] * 4).to(next(net.parameters()).device, dtype)
    features = example if on_cuda else None
    parts = zip(net.stages, net.heads, net.stage_costs, _shares(net), expected, strict=True)
    for i, (stage, head, cost, share, wanted) in enumerate(parts):
        assert isinstance(head, ExitHead)
        counted = None
        folded, note = fold_stage(stage, dtype) if features is None else fastest_stage(stage, dtype, features)
        if reason_against := trial.mismatch(folded, wanted.seen, wanted.features, dtype):
            folded, note = channels_last(inference_copy(stage), dtype), f"not folded: {reason_against}"
            if different := trial.mismatch(folded, wanted.seen, wanted.features, dtype):
                raise UnsupportedError(f"stage {i}: {different}")
        if features is not None:
            features = folded(features)
            # Convolutions of a head would run on the dead rows, too.
            counted = _counted(stage, dtype, wanted) if triton and len(head.convs) < 2 else None
        # On the CPU PyTorch's convolution is the faster one; in CUDA C++ there is none.
        conv = pack_conv(head.convs[-1], dtype) if len(head.convs) and triton else None
        convs, _ = fold_stage(head.convs[:-1] if conv else head.convs, dtype)
        rows.append(StagePlan(cost.feature_shape, share, kernel + " with conv" * (conv is not None), note))
        step = CompactStep(folded, convs, conv, *pack_head(head), head.kind == "plain", counted)
        if different := trial.mismatch(partial(_exit_rows, step), wanted.features, wanted.rows, dtype):
            raise UnsupportedError(f"the head of exit {i}: {different}")
        steps.append(step)
    return Plan("compact", device, dtype, net.criterion.name, reason, tuple(rows), tuple(steps))


def _counted(stage: nn.Module, dtype: torch.dtype, wanted: trial.Expected) -> IndexedStage | None:
    """The device-counted form, where there is one that gives the stage's answers."""
    counted = device_counted(stage, dtype)
    if counted is None:
        return None
    live = torch.full((1,), len(wanted.seen), dtype=torch.int32, device=wanted.seen.device)
    return None if trial.mismatch(lambda x: counted(x, None, live), wanted.seen, wanted.features, dtype) else counted


def _exit_rows(step: CompactStep, features: Tensor) -> Tensor:
    """[N, K + 1] float32 logits and confidence row of an exit, as the packed weights give them."""
    seen = step.head_convs(features)
    if step.conv is not None:
        weight, bias = step.conv
        seen = nn.functional.conv2d(seen, weight, bias.to(seen), padding=1).relu()
    pooled = seen.permute(0, 2, 3, 1).flatten(1) if step.flatten else seen.mean((2, 3))
    return nn.functional.linear(pooled.float(), step.weight, step.bias)


def _shares(net: EarlyExitNet) -> Sequence[float]:
    total = max(sum(c.stage_macs for c in net.stage_costs), 1)  # stages may be all identities
    return [c.stage_macs / total for c in net.stage_costs]


@cache
def _log_once(message: str) -> None:
    log.warning(message)
