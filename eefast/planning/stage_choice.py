"""Stage → the fastest of its inference copies (folded, fused, compiled) that is as exact as the folded one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import fusing
from .compiled_stages import CompileTime
from .folding import fold_stage
from .inference_copies import inference_copy
from .probe import fastest_of
from .trial import brief

ROUNDS = 5

COMPARED = 32
"""Rows that are compared with float64; all are timed."""

COMPILED = "torch.compile"


def fastest_stage(
    stage: nn.Module, dtype: torch.dtype, example: Tensor, compile_time: CompileTime | None = None
) -> tuple[nn.Module, str]:
    """The fastest inference copy of `stage` in `dtype`, and a note such as "fused (9 of 9 convolutions), 1.4× folded".

    example: [N, C, H, W] features to measure on, on the stage's device; N ≥ 1. compile_time: what the plan has left for
    torch.compile; None, or none at first: it is not tried.
    On CUDA the candidates are the folded stage, its fused convolutions, those of them that are faster fused, and
    torch.compile. Before anything is timed, each candidate's features are compared with those of float64, computed in
    memory full of NaN: a candidate is left out where its error is more than twice the folded stage's, where it raises
    an exception, and torch.compile where it takes too long; the note says so. On the CPU the folded stage is returned:
    fused, it would call the same kernels there.
    Raises `ValueError` where `example` has no rows.
    """
    if len(example) == 0:
        raise ValueError(f"example has shape {list(example.shape)}; pass at least one row of features to measure on")
    folded, what = fold_stage(stage, dtype)
    if not fusing.on_cuda(example):
        return folded, what
    fused, count, total = fusing.fuse_convolutions(folded)
    candidates = {what: folded}
    features = example.to(dtype, copy=True, memory_format=torch.channels_last)
    if count:
        candidates[f"fused ({count} of {total} convolutions)"] = fused
        mixed, apart = faster_apart(fused, features)
        if 0 < apart < count:
            candidates[f"fused ({count - apart} of {total} convolutions, {apart} faster apart)"] = mixed
    exact = inference_copy(stage).to(torch.float64)
    # A copy, since a stage may change its input in place.
    return _fastest(candidates, exact, features, compile_time)


@torch.no_grad()
def faster_apart(fused: nn.Module, features: Tensor) -> tuple[nn.Module, int]:
    """A copy of a fused stage in which the convolutions that are slower in one kernel run apart, and their number.

    cuDNN's fused kernels are several times slower than its plain ones at some shapes. Each shape is measured once, on
    what comes to it from `features`; where that fails, all stay in one kernel.
    """
    module = copy.deepcopy(fused, {id(p): p for p in (*fused.parameters(), *fused.buffers())})
    seen: dict[Any, list[fusing.FusedConv]] = {}
    inputs: dict[Any, tuple[Tensor, ...]] = {}

    def note(conv: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, fusing.FusedConv)
        key = conv.extra_repr(), conv.groups, conv.dilation, tuple(x.shape for x in given)
        seen.setdefault(key, []).append(conv)
        inputs.setdefault(key, given)

    convs = [m for m in module.modules() if isinstance(m, fusing.FusedConv) and m.relu]
    hooks = [conv.register_forward_pre_hook(note) for conv in convs]
    try:
        module(features.clone())
    except Exception:  # `_fastest` tells why
        return module, 0
    finally:
        for hook in hooks:
            hook.remove()
    apart = 0
    for key, alike in seen.items():
        together, separate = (_alone(alike[0], whole) for whole in (True, False))
        try:
            first, second = seconds_of([together, separate], *inputs[key])
        except Exception:  # as above
            return module, 0
        if second < first:
            apart += len(alike)
            for conv in alike:
                conv.in_one_kernel = False
    return module, apart


def _alone(conv: fusing.FusedConv, in_one_kernel: bool) -> fusing.FusedConv:
    found = copy.copy(conv)
    found.in_one_kernel = in_one_kernel
    return found


@torch.no_grad()
def _fastest(
    candidates: dict[str, nn.Module], exact: nn.Module, features: Tensor, compile_time: CompileTime | None
) -> tuple[nn.Module, str]:
    """The fastest candidate that is as exact as the first one, the folded stage, and the note about it."""
    first, few = next(iter(candidates)), features[:COMPARED]
    try:
        # In parts, since float64 takes four times the memory of float16.
        wanted = torch.cat([exact(part.to(torch.float64, copy=True)) for part in few.split(16)])
    except Exception as problem:  # a stage may not take float64
        return candidates[first], f"{first}; not measured, since float64 fails: {brief(problem)}"

    def error(candidate: nn.Module) -> float:
        candidate(few.clone())  # what it frees is what it gets again
        poison_free_memory(few.device)
        return float((candidate(few.clone()).double() - wanted).abs().max())

    remarks = list[str]()
    if compile_time is not None and compile_time.seconds:
        try:
            candidates[COMPILED] = compile_time.compiled(candidates[first], features)
        except Exception as problem:  # torch.compile raises whatever it does
            remarks.append(f"; {COMPILED} left out: {brief(problem)}")
    allowed = 2 * error(candidates[first])
    for name in [*candidates][1:]:
        try:
            found = error(candidates[name])
            reason = "" if found <= allowed else f"its error is {found:.1g}, more than twice that of {first}"
        except Exception as problem:  # cuDNN and torch.compile raise whatever they do
            reason = brief(problem)
        if reason:
            remarks.append(f"; {name} left out: {reason}")
            del candidates[name]
    seconds = seconds_of(list(candidates.values()), features)
    least = min(seconds)
    best = list(candidates)[seconds.index(least)]
    speed = "" if best == first else f", {seconds[0] / least:.1f}× {first}"
    if best != COMPILED and COMPILED in candidates:
        slower = seconds[list(candidates).index(COMPILED)] / least
        remarks.insert(0, f"; {COMPILED} takes {slower:.2f}×")
    return candidates[best], "".join([best, speed, *remarks])


def seconds_of(candidates: Sequence[nn.Module], *inputs: Tensor) -> list[float]:
    """Of each candidate, the least over rounds in which all take turns; on CUDA as graphs, as the engine runs them."""
    runs: list[Callable[[], Any]] = [partial(candidate, *inputs) for candidate in candidates]
    if inputs[0].is_cuda:
        runs = [partial(_finished, _captured(run), inputs[0].device) for run in runs]
    return fastest_of(runs, ROUNDS)


def poison_free_memory(device: torch.device) -> None:
    """Fill what the allocator of a CUDA device has in reserve with NaN, so that reading it before it is written shows.

    cuDNN's fused convolution reads its own result times 0, which an engine may really compute: in a graph's pool that
    is what ran before.
    """
    if device.type != "cuda":
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = [s for s in torch.cuda.memory_snapshot() if s["device"] == index and s["segment_pool_id"] == (0, 0)]
    free = [b["size"] for segment in segments for b in segment["blocks"] if b["state"] == "inactive"]
    with suppress(torch.OutOfMemoryError):
        held = [torch.full((size // 4,), torch.nan, device=device) for size in free]
        del held


def _finished(run: Callable[[], Any], device: torch.device) -> None:
    run()
    torch.cuda.synchronize(device)


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, or unchanged where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # whatever the stage does that a capture forbids
        return run
    return graph.replay
