"""Stage → the fastest of its inference copies (folded, fused, compiled) that is as exact as the folded one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import fusing
from .folding import fold_stage
from .inference_copies import inference_copy
from .probe import fastest_of
from .trial import brief

ROUNDS = 5

log = logging.getLogger("eefast")


def fastest_stage(stage: nn.Module, dtype: torch.dtype, example: Tensor) -> tuple[nn.Module, str]:
    """The fastest inference copy of `stage` in `dtype`, and a note such as "fused (9 of 9 convolutions), 1.4× folded".

    example: [N, C, H, W] features to measure on, on the stage's device; N ≥ 1.
    On CUDA the candidates are the folded stage, its fused convolutions and, where those are not all, torch.compile.
    Before anything is timed, each candidate's features are compared with those of float64: a candidate is left out
    where its error is more than twice the folded stage's or where it raises an exception; the note says so. On the CPU
    the folded stage is returned: fused, it would call the same kernels there.
    Raises `ValueError` where `example` has no rows.
    """
    if len(example) == 0:
        raise ValueError(f"example has shape {list(example.shape)}; pass at least one row of features to measure on")
    folded, what = fold_stage(stage, dtype)
    if not fusing.on_cuda(example):
        return folded, what
    fused, count, total = fusing.fuse_convolutions(folded)
    candidates = {what: folded}
    if count:
        candidates[f"fused ({count} of {total} convolutions)"] = fused
    if count < total:
        log.warning("planning tries torch.compile for a stage, %d of whose %d convolutions fuse", count, total)
        candidates["torch.compile"] = cast(nn.Module, torch.compile(folded, dynamic=True))
    exact = inference_copy(stage).to(torch.float64)
    # A copy, since a stage may change its input in place.
    return _fastest(candidates, exact, example.to(dtype, copy=True, memory_format=torch.channels_last))


@torch.no_grad()
def _fastest(candidates: dict[str, nn.Module], exact: nn.Module, features: Tensor) -> tuple[nn.Module, str]:
    """The fastest candidate that is as exact as the first one, the folded stage, and the note about it."""
    first, *others = candidates
    try:
        # In parts, since float64 takes four times the memory of float16.
        wanted = torch.cat([exact(part.to(torch.float64, copy=True)) for part in features.split(16)])
    except Exception as problem:  # a stage may not take float64
        return candidates[first], f"{first}; not measured, since float64 fails: {brief(problem)}"

    def error(candidate: nn.Module) -> float:
        return float((candidate(features.clone()).double() - wanted).abs().max())

    allowed, remarks = 2 * error(candidates[first]), []
    for name in others:
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
    return candidates[best], "".join([best, speed, *remarks])


def seconds_of(candidates: Sequence[nn.Module], features: Tensor) -> list[float]:
    """Of each candidate, the least over rounds in which all take turns; on CUDA as graphs, as the engine runs them."""
    runs: list[Callable[[], Any]] = [partial(candidate, features) for candidate in candidates]
    if features.is_cuda:
        runs = [partial(_finished, _captured(run), features.device) for run in runs]
    return fastest_of(runs, ROUNDS)


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
