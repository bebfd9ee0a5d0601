"""Build the resident engine: lowered network → the program that the op runs, checked against the network's answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..engines.program import ResidentProgram, StagePlan
from ..engines.resident import ResidentEngine
from ..model import EarlyExitNet
from ..quantized import ALGORITHMS
from . import layers, probe, trial, tuning
from .bfloat16_choice import tuned_for_bfloat16
from .errors import UnsupportedError
from .integer_lowering import is_quantized, lower_integers
from .layers import Lowered
from .lowering import lower
from .packing import cuda_program
from .packing import program as packed_program
from .trial import Subject


def lowered(subject: Subject) -> Lowered:
    """The network as the resident engine's layers; `UnsupportedError` says why that is impossible."""
    net, dtype = subject.net, subject.dtype
    if net.criterion.step:
        raise UnsupportedError(f"criterion {net.criterion.name!r} is a rule in Python, which its kernels do not call")
    if is_quantized(net):
        return _lowered_to_integers(subject)
    if subject.device.type == "cuda":
        found = _lowered_for_cuda(net, dtype)
    elif ops.CPP_MISSING:
        raise UnsupportedError(f"its C++ kernels are {ops.CPP_MISSING}")
    elif dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"it computes in float32 or bfloat16, not in {dtype}")
    else:
        found = lower(net)
    answers = layers.answers(found, subject.expected[0].seen.cpu())
    allowed = trial.tolerance(torch.float32, subject.device)
    for i, (rows, wanted) in enumerate(zip(answers, subject.expected, strict=True)):
        if reason := trial.difference(rows, wanted.rows.cpu(), allowed):
            raise UnsupportedError(f"as its steps, the network's {reason} at exit {i}")
    return found


def _lowered_to_integers(subject: Subject) -> Lowered:
    """The layers of a quantised network; the program as a whole is compared with its answers later."""
    if subject.device.type == "cuda":
        raise UnsupportedError("it has no INT8 kernels on CUDA")
    if ops.CPP_MISSING:
        raise UnsupportedError(f"its C++ kernels are {ops.CPP_MISSING}")
    return lower_integers(subject.net)


def _lowered_for_cuda(net: EarlyExitNet, dtype: torch.dtype) -> Lowered:
    if ops.CUDA_MISSING:
        raise UnsupportedError(f"its CUDA kernels are {ops.CUDA_MISSING}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedError(f"on CUDA it computes in float16 or bfloat16, not in {dtype}; pass dtype=torch.float16")
    if net.rows_as_maps:
        raise UnsupportedError("its CUDA kernel has square windows of square maps, none for rows")
    if max(net.input_shape[1:]) > 32:
        height, width = net.input_shape[1:]
        raise UnsupportedError(f"its CUDA kernel takes images of up to 32×32, not {height}×{width}")
    found = lower(net, every_step=False)
    try:
        _shared_memory(net, cuda_program(found, dtype, torch.device("cpu")))
    except RuntimeError as error:
        raise UnsupportedError(str(error)) from error
    return found


def _shared_memory(net: EarlyExitNet, program: ResidentProgram) -> int:
    """Bytes that the CUDA kernel needs for the maps; `RuntimeError` where it lacks a step."""
    tables = program.steps, program.maps, program.groups, program.packed, net.thresholds
    more = probe.criterion(net), net.num_classes, program.bfloat16
    return ops.resident_shared_memory(torch.empty(0, *net.input_shape), *tables, *more)


def build_resident(subject: Subject, found: Lowered) -> ResidentEngine:
    """found: the network as `lowered`. Raises `UnsupportedError` where the op gives other answers."""
    build = _for_cuda if subject.device.type == "cuda" else _for_cpu
    return build(subject, found)


def _for_cpu(subject: Subject, found: Lowered) -> ResidentEngine:
    net, expected = subject.net, subject.expected
    images = probe.images(net, subject.example_inputs)
    if subject.dtype == torch.bfloat16:
        program, notes = tuned_for_bfloat16(net, found, images)
    else:
        program, note = tuning.tuned(net, found, False, images)
        notes = (note,) if note else ()
    computed = torch.bfloat16 if program.bfloat16 else torch.float32
    allowed = trial.tolerance(computed, subject.device)
    all_logits = tuning.all_logits(net, program, expected[0].seen.float())
    for i, (logits, wanted) in enumerate(zip(all_logits, expected, strict=True)):
        if different := trial.difference(logits, wanted.rows[:, :-1], allowed):
            raise UnsupportedError(f"its {different} at exit {i}")
    kernel = _kernel(found)
    if found.image is not None and "vnni" not in kernel:
        notes = (*notes, SLOW_INT8)
    rows = _rows(net, found, kernel, lambda section: _section(found, program, section))
    repack = None if program.image is not None else partial(_repacked, net, program.group_sizes, program.bfloat16)
    return ResidentEngine(net, subject.plan("resident", rows, *notes), program, repack)


def _repacked(
    net: EarlyExitNet, groups: tuple[int, ...], bfloat16: bool, algorithms: tuple[int, ...]
) -> ResidentProgram:
    """The program of a plan whose measurements chose other Winograd tiles."""
    return packed_program(lower(net), algorithms, groups, bfloat16, {})


SLOW_INT8 = (
    "without VNNI the INT8 kernels are slow here, and the float32 network is faster: run the network that was quantised"
)


def _kernel(found: Lowered) -> str:
    if found.image is None:
        return f"C++, {ops.instruction_set().replace('_', '-')}"
    return f"C++, INT8, {ops.int8_instruction_set().replace('_', '-')}"


def _for_cuda(subject: Subject, found: Lowered) -> ResidentEngine:
    net, device = subject.net, subject.device
    program = cuda_program(found, subject.dtype, device)
    program = replace(program, normalization=_normalization(net, device))
    rows = _rows(net, found, "in the kernel", lambda section: "{}×{}".format(*found.sizes[section]))
    kilobytes = _shared_memory(net, program) / 1024
    note = f"one kernel for the whole network, {kilobytes:.0f} KiB of shared memory per image in work"
    return ResidentEngine(net, subject.plan("resident", rows, note), program)


def _rows(net: EarlyExitNet, found: Lowered, kernel: str, described: Callable[[int], str]) -> list[StagePlan]:
    """The rows of the plan's table; described: how a section runs."""
    rows, begin = [], 0
    for cost, share, end in zip(net.stage_costs, trial.shares(net), found.exit_sections, strict=True):
        note = ", ".join(described(section) for section in range(begin, end + 1))
        rows.append(StagePlan(cost.feature_shape, share, kernel, note))
        begin = end
    return rows


def _section(found: Lowered, program: ResidentProgram, section: int) -> str:
    """How a section runs, for instance "16×16 F(4×4) by 4": map size, Winograd tiles, samples that go together.

    Of rows "1×128 F(4, 3)". Of integers, where the convolutions that Winograd could compute differ: how many are
    computed in each way.
    """
    size, side, group = found.sizes[section], program.algorithms[section], program.group_sizes[section]
    able = [layer for layer in found.layers if layer.section == section and layer.allows_winograd]
    tiles = f"F({side}, 3)" if all(layer.row for layer in able) else f"F({side}×{side})"
    algorithm = tiles if side else "direct"
    if found.image is not None:
        counts = Counter(layer.algorithm(0) for layer in able)
        parts = [(n, ALGORITHMS[winograd]) for winograd, n in sorted(counts.items(), reverse=True)]
        algorithm = " + ".join(name if len(parts) == 1 else f"{n} {name}" for n, name in parts) or "direct"
    return f"{size[0]}×{size[1]} {algorithm}" + (f" by {group}" if group > 1 else "")


def _normalization(net: EarlyExitNet, device: torch.device) -> Tensor | None:
    """[2, C] scale and shift that make of uint8 pixels what `net.prepare` makes of them."""
    if net.normalization is None:
        return None
    mean, std = (torch.tensor(part, dtype=torch.float64) for part in net.normalization)
    return torch.stack([1 / (255 * std), -mean / std]).to(device, torch.float32)
