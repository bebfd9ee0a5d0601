"""Build the compact engine: each stage and head in its fastest form that gives the network's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..engines.compact import CompactEngine
from ..engines.host_reads import arriving
from ..engines.program import CompactStep, StagePlan, layout_of, with_times
from ..heads import ExitHead
from ..model import EarlyExitNet
from ..quantized import QuantizedStage
from ..runtimes import RUNTIMES
from ..runtimes.stage_and_head import head_input
from ..system.memory import keep_freed
from . import probe, trial
from .beside_openmp import fastest_beside_openmp
from .capture import survivors_of, with_graphs
from .compiled_stages import SECONDS, CompileTime
from .errors import SlowerError, UnsupportedError
from .folding import fold_stage
from .head_packing import pack_conv, pack_head
from .indexed_stages import IndexedStage, device_counted, reading_through_rows
from .inference_copies import channels_last, inference_copy
from .stage_choice import fastest_stage, seconds_of
from .stage_runtimes import (
    CHUNK,
    PYTORCH,
    Chosen,
    HeadBody,
    chosen,
    chunk_in_libraries,
    has_head,
    has_large_images,
    missing_runtimes,
    uses_openmp,
)
from .trial import Subject

HOPELESS, BEST_REST, TELLING = 1.1, 0.8, 0.4
"""Of another engine's time to the final exit: from when on nothing more is measured, if the stages that are left took
only the second part of what is to be expected. That is its time for them or, once the measured stages are the third
part of its time, as many times that as these took.
"""

SHORT = 1.5e-4
"""Seconds of a stage beyond which a wait for a count, a tenth of it, costs less than slower kernels."""


def obstacle(net: EarlyExitNet, device: torch.device) -> str:
    """Why the exits of this network have no kernel on a device; "" if they have."""
    if device.type == "cuda" and net.criterion.step:
        return f"criterion {net.criterion.name!r} is a rule in Python, which CUDA graphs do not hold"
    if device.type == "cuda" and not ops.exit_kernels():
        return f"{ops.TRITON_MISSING}, and the CUDA kernels are {ops.CUDA_MISSING}"
    if device.type == "cuda" and net.num_classes > ops.MAX_CLASSES_ON_CUDA:
        return f"the Triton exit heads go to {ops.MAX_CLASSES_ON_CUDA} classes, the network has {net.num_classes}"
    return ""


def build_compact(subject: Subject) -> CompactEngine:
    """Raises `UnsupportedError` where no form of a stage or head gives the network's answers."""
    engine = fastest_beside_openmp(subject, _fastest_stages(subject), _fastest_stages)
    return with_graphs(engine, subject.example_inputs, subject.max_batch_size)


def _fastest_stages(subject: Subject) -> CompactEngine:
    """Each stage by what is the fastest for it alone."""
    net, device, dtype = subject.net, subject.device, subject.dtype
    if missing := obstacle(net, device):
        raise UnsupportedError(missing)
    on_cuda = device.type == "cuda"
    if on_cuda and subject.stages in RUNTIMES:
        raise ValueError(f"stages={subject.stages!r} is for CPUs, the network is on {device}; leave stages out")
    kernel = "Python" if net.criterion.step else _kernel(on_cuda)
    reasons = []
    if ops.CPP_MISSING and not on_cuda:
        reasons.append(f"exits run in PyTorch, since the C++ kernels are {ops.CPP_MISSING}")
    if not on_cuda and subject.stages == "auto" and dtype == torch.float32:
        reasons.extend(missing_runtimes())
    features: Tensor | None = None
    rows_of: list[int] = []
    if not on_cuda:
        keep_freed()
    else:
        # The network's device: tests plan for a GPU that is not there.
        there = next(net.parameters()).device
        shares = survivors_of(net, subject.example_inputs)
        rows_of = arriving(subject.max_batch_size, shares) if shares else [4 * probe.IMAGES] * len(net.stages)
        some = probe.images(net, subject.example_inputs)
        features = some[torch.arange(rows_of[0]) % len(some)].to(there, dtype)
    compile_time = CompileTime(0.0 if subject.stages == PYTORCH else SECONDS)
    rows, steps, layout, seconds = [], list[CompactStep](), torch.channels_last, list[float]()
    parts = zip(net.stages, net.heads, net.stage_costs, trial.shares(net), subject.expected, strict=True)
    for i, (stage, head, cost, share, wanted) in enumerate(parts):
        assert isinstance(head, ExitHead)
        subject.progress("planning stages", i, len(net.stages))
        features = None if features is None else features[: rows_of[i]]
        folded, note = _stage(stage, dtype, features, wanted, f"stage {i}", compile_time)
        # Convolutions of a head would run on the dead rows, too; all images are live before the first stage.
        counts = kernel == "Triton" and len(head.convs) < 2 and i > 0 and _shows_waits(folded, features)
        features = None if features is None else folded(features)
        found = Chosen(folded, note)
        packed = _packed(head, dtype, kernel)
        if not on_cuda:
            spend = partial(_check_rival, subject, i, sum(seconds))
            body = HeadBody(head.convs, packed.convs, packed.flatten)
            found = _by_runtime(subject, stage, found, wanted, layout, spend, body, steps[-1].stage if steps else None)
            layout = layout_of(found.stage)
            seconds.append(found.seconds)
        form = _counted(stage, dtype, wanted) if counts else None
        step = CompactStep(found.stage, *packed, form, found.chunk, with_head=has_head(found.stage))
        if kernel == "Triton" and i > 0 and rows_of:
            step = replace(step, through=_through(folded, wanted, dtype))
        if different := trial.mismatch(partial(_exit_rows, step), wanted.features, wanted.rows, dtype):
            raise UnsupportedError(f"the head of exit {i}: {different}")
        how = kernel + " with conv" * (step.conv is not None) + " (linear)" * step.with_head
        rows.append(StagePlan(cost.feature_shape, share, how, found.note))
        steps.append(step)
    rows = list(with_times(rows, seconds)) if seconds else rows
    return CompactEngine(net, subject.plan("compact", rows, *reasons), steps)


def _kernel(on_cuda: bool) -> str:
    """What evaluates exits."""
    if on_cuda:
        return "Triton" if ops.exit_kernels() == "triton" else "CUDA"
    return "PyTorch" if ops.CPP_MISSING else "C++"


def _stage(
    stage: nn.Module, dtype: torch.dtype, features: Tensor | None, wanted: trial.Expected, where: str,
    compile_time: CompileTime,
) -> tuple[nn.Module, str]:  # fmt: skip
    """An inference copy and how it runs; features: to measure on, where there is a choice."""
    if features is None:
        folded, note = fold_stage(stage, dtype)
    else:
        folded, note = fastest_stage(stage, dtype, features, compile_time)
    if reason := trial.mismatch(folded, wanted.seen, wanted.features, dtype, stage):
        folded, note = channels_last(inference_copy(stage), dtype), f"not folded: {reason}"
        if different := trial.mismatch(folded, wanted.seen, wanted.features, dtype, stage):
            raise UnsupportedError(f"{where}: {different}")
    return folded, note


def _check_rival(subject: Subject, i: int, before: float, seconds: float) -> None:
    """`SlowerError` where stages 0 … i take so long that the others will not make up for it.

    before: seconds of an image in stages 0 … i - 1; seconds: in stage i.
    """
    if not subject.rival:
        return
    here, there, end = before + seconds, subject.rival[i], subject.rival[-1]
    ratio = max(1.0, here / there) if there >= TELLING * end else 1.0
    if here + BEST_REST * ratio * (end - there) > HOPELESS * end:
        what = f"the stages up to exit {i} take {here / there:.1f}× as long"
        raise SlowerError(f"{what} ({1e3 * here:.1f} ms per image, {1e3 * there:.1f})")


def _by_runtime(
    subject: Subject,
    stage: nn.Module,
    folded: Chosen,
    wanted: trial.Expected,
    layout: torch.memory_format,
    spend: Callable[[float], None],
    head: HeadBody,
    before: nn.Module | None,
) -> Chosen:
    """What runs a stage on the CPU; wanted: what it computes, of features in `layout`; the others: see `chosen`."""
    seen, after = wanted.seen, wanted.features
    if subject.dtype == torch.float32 == seen.dtype and not isinstance(stage, QuantizedStage):
        in_chunks = has_large_images(subject.net)
        found = chosen(stage, folded, seen, layout, subject.stages, in_chunks, spend, head, before)
        if in_chunks:
            return found
        largest = 4 * max(prod(seen.shape[1:]), prod(after.shape[1:]))
        return replace(found, chunk=CHUNK if uses_openmp(found.stage) else chunk_in_libraries(largest))
    if subject.stages in ("auto", PYTORCH):
        return replace(folded, chunk=CHUNK)
    asked, dtype = f"stages={subject.stages!r}", str(subject.dtype).removeprefix("torch.")
    if isinstance(stage, QuantizedStage):
        raise ValueError(f"{asked}: this network is in integers that only eefast computes; leave stages out")
    raise ValueError(f"{asked} runs stages in float32, not in {dtype}; use stages='auto' or another dtype")


class _Packed(NamedTuple):
    """Of a head, see `CompactStep`."""

    convs: nn.Module
    conv: tuple[Tensor, Tensor] | None
    weight: Tensor
    bias: Tensor
    flatten: bool


def _packed(head: ExitHead, dtype: torch.dtype, kernel: str) -> _Packed:
    # On the CPU PyTorch's convolution is the faster one; in CUDA C++ there is none.
    conv = pack_conv(head.convs[-1], dtype) if len(head.convs) and kernel == "Triton" else None
    convs, _ = fold_stage(head.convs[:-1] if conv else head.convs, dtype)
    return _Packed(convs, conv, *pack_head(head), head.kind == "plain")


def _shows_waits(stage: nn.Module, features: Tensor | None) -> bool:
    """Whether a stage is so short that counting its rows on the device, in slower kernels, may pay."""
    return features is not None and seconds_of([stage], features)[0] < SHORT


def _counted(stage: nn.Module, dtype: torch.dtype, wanted: trial.Expected) -> nn.Module | None:
    """The device-counted form, where there is one that gives the stage's answers."""
    counted = device_counted(stage, dtype)
    if counted is None:
        return None
    live = torch.full((1,), len(wanted.seen), dtype=torch.int32, device=wanted.seen.device)
    return None if trial.mismatch(lambda x: counted(x, None, live), wanted.seen, wanted.features, dtype) else counted


def _through(stage: nn.Module, wanted: trial.Expected, dtype: torch.dtype) -> IndexedStage | None:
    """The stage, as it runs, in the form that reads rows of its input, where there is one that gives its answers."""
    found = reading_through_rows(stage)
    if found is None:
        return None
    n, there = len(wanted.seen), wanted.seen.device
    rows, live = torch.arange(n, dtype=torch.int32, device=there), torch.full((1,), n, dtype=torch.int32, device=there)
    return None if trial.mismatch(lambda x: found(x, rows, live), wanted.seen, wanted.features, dtype) else found


def _exit_rows(step: CompactStep, features: Tensor) -> Tensor:
    """[N, K + 1] float32 logits and confidence row of an exit, as the packed weights give them."""
    seen = step.head_convs(features)
    if step.conv is not None:
        weight, bias = step.conv
        seen = nn.functional.conv2d(seen, weight, bias.to(seen), padding=1).relu()
    return nn.functional.linear(head_input(seen, step.flatten).flatten(1).float(), step.weight, step.bias)
