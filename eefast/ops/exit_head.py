"""One exit for the whole live batch: pooling, logits, confidence, threshold, result write, survivor list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import criteria
from .checks import (
    Named,
    check_apart,
    check_fake,
    check_range_on_cuda,
    check_rule,
    check_stored,
    check_traced,
    check_written,
    refuse_gradient,
)
from .library import define, namespace
from .on_cuda import implement_on_cuda

MAX_CLASSES_ON_CUDA = 8191
"""What the Triton exit heads keep in registers."""

_SCHEMA = (
    "(Tensor features, Tensor weight, Tensor bias, Tensor? threshold, Tensor rows, Tensor positions,"
    " Tensor live, str criterion, int exit_index, Tensor(a!) logits, Tensor(b!) confidence, Tensor(c!) exits,"
    " Tensor? rule=None) -> (Tensor, Tensor, Tensor)"
)
define("exit_head" + _SCHEMA)
define("exit_head_cuda" + _SCHEMA)


def reference(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`exit_head` in plain PyTorch: its oracle, its fallback and its documentation."""
    chosen = criteria.get(criterion)
    check(features, weight, bias, threshold, rows, positions, live, logits, confidence, exits, criterion, rule)
    alive = torch.arange(len(rows), device=rows.device) < live
    if len(features):
        pooled = features[rows.where(alive, 0)].float().mean(dim=(2, 3))
    else:
        pooled = torch.zeros(len(rows), weight.shape[1], dtype=torch.float32, device=features.device)
    with torch.autocast(features.device.type, enabled=False):
        out = torch.nn.functional.linear(pooled, weight, bias)
    answer, value = out[:, :-1], chosen.confidence(out[:, :-1], out[:, -1])
    place = positions.where(alive, 0) if len(confidence) else positions.new_empty(0)
    if rule is not None and len(confidence):
        answer, value = criteria.carry(answer, out[:, -1], rule, logits[place], confidence[place])
        logits[place[alive]], confidence[place[alive]] = answer[alive], value[alive]
    if threshold is not None and threshold.dim():
        threshold = threshold[place] if len(threshold) else threshold.new_zeros(len(rows))
    leaves = alive if threshold is None else alive & criteria.exits_by(chosen, value, threshold)
    left = positions[leaves]
    logits[left], confidence[left], exits[left] = answer[leaves], value[leaves], exit_index
    survives = alive & ~leaves
    others = survives.logical_not().nonzero()[:, 0].flip(0)
    order = torch.cat([survives.nonzero()[:, 0], others])
    return rows[order], positions[order], survives.sum(dtype=torch.int32).view(1)


def check(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, logits: Tensor, confidence: Tensor, exits: Tensor, criterion: str, rule: Tensor | None,
) -> None:  # fmt: skip
    """`RuntimeError`, as from PyTorch's ops, unless the arguments fit; the C++ kernel has the same checks."""
    results_given = (("logits", logits), ("confidence", confidence), ("exits", exits))
    given: tuple[Named, ...] = (
        *(("features", features), ("weight", weight), ("bias", bias), ("threshold", threshold)),
        *(("rows", rows), ("positions", positions), ("live", live)),
    )
    check_stored(*given, *results_given, optional=["threshold"])
    if features.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        raise RuntimeError(f"features is {features.dtype}; convert it with .to(torch.float32)")
    if features.dim() != 4 or 0 in features.shape[1:]:
        raise RuntimeError(
            f"features has shape {list(features.shape)}; expected [M, C, H, W] with at least one channel and one pixel"
        )
    if weight.dim() != 2 or weight.shape[0] < 2 or weight.shape[1] != features.shape[1]:
        raise RuntimeError(
            f"weight has shape {list(weight.shape)}; expected [K + 1, C] with at least one class and "
            f"C = {features.shape[1]}, the channels of features"
        )
    classes, results = weight.shape[0] - 1, confidence.numel()
    expected: tuple[tuple[str, Tensor | None, torch.dtype, list[int]], ...] = (
        ("weight", weight, torch.float32, [classes + 1, features.shape[1]]),
        ("bias", bias, torch.float32, [classes + 1]),
        ("threshold", threshold, torch.float32, [results] if threshold is not None and threshold.dim() else []),
        ("rows", rows, torch.int32, [rows.numel()]),
        ("positions", positions, torch.int32, [rows.numel()]),
        ("live", live, torch.int32, [1]),
        ("logits", logits, torch.float32, [results, classes]),
        ("confidence", confidence, torch.float32, [results]),
        ("exits", exits, torch.int64, [results]),
    )
    for name, tensor, dtype, shape in expected:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to({dtype})")
        if list(tensor.shape) != shape:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
        if tensor.device != features.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {features.device}, where features is")
    check_rule(criterion, rule, [9], features.device)
    for name, tensor in results_given:
        check_written(name, tensor)
    check_apart(results_given, (*given, ("rule", rule)))
    # On a GPU reading the indices would wait for the device; there the kernel stops at one that is out of range.
    if features.device.type == "cpu":
        count = int(live)
        if not 0 <= count <= len(rows):
            raise RuntimeError(f"live = {count}; expected 0 … {len(rows)}, the length of rows")
        for name, index, owner, size in (
            ("rows", rows, "features", len(features)),
            ("positions", positions, "logits", results),
        ):
            for i, value in enumerate(index[:count].tolist()):
                if not 0 <= value < size:
                    raise RuntimeError(f"{name}[{i}] = {value} is outside of {owner}, which has {size} rows")
        if rule is not None and len(positions[:count].unique()) < count:
            raise RuntimeError("positions has a place twice; with a rule every sample needs another one")


def check_classes_on_cuda(classes: int) -> None:
    """`RuntimeError` for a head that is too large for the Triton kernels."""
    if classes > MAX_CLASSES_ON_CUDA:
        raise RuntimeError(
            f"weight has {classes} classes, on CUDA at most {MAX_CLASSES_ON_CUDA}; use engine='reference'"
        )


namespace.impl("exit_head", reference, "CompositeExplicitAutograd")


def run_triton(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ..kernels import exit_head as kernel

    criteria.get(criterion)
    check(features, weight, bias, threshold, rows, positions, live, logits, confidence, exits, criterion, rule)
    check_classes_on_cuda(len(weight) - 1)
    check_range_on_cuda(features, rows, ("weight", weight))
    return kernel.run(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits, rule
    )


implement_on_cuda("exit_head", run_triton)


@torch.library.register_fake("eefast::exit_head")
def fake(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(
        features, ("weight", weight), ("bias", bias), ("threshold", threshold), ("rows", rows),
        ("positions", positions), ("live", live), ("logits", logits), ("confidence", confidence), ("exits", exits),
        ("rule", rule),
    )  # fmt: skip
    check_traced(features, ("weight", weight, 2), ("rows", rows, 1), ("logits", logits, 2))
    return torch.empty_like(rows), torch.empty_like(rows), rows.new_empty(1)


def flops(features: Any, weight: Any, bias: Any, threshold: Any, rows: Any, *args: Any, **kwargs: Any) -> int:
    """For torch's FLOP counter, from the shapes: those of the linear layer, for all of the live list."""
    return 2 * rows[0] * weight[0] * weight[1]


def run(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Evaluate one exit for all live samples, write the answers of those that exit, list those that survive.

    features: [M, C, H, W] float32, float16, bfloat16 or float64; pooled in float32; any strides, contiguous and
        channels-last are fast. On CUDA other layouts, and samples that start off 16-byte boundaries, get copied.
    weight, bias: [K + 1, C] and [K + 1] float32: the class rows, then the confidence row.
    threshold: [] float32, compared as the criterion says; None at the final exit, where every sample exits. Or [N],
        one for each place in the results; there NaN lets the sample exit, whatever its confidence.
    rows, positions: [R] int32 each, the live list: row of `features` and place in the results of each live sample.
        Entries beyond `live` may hold anything.
    live: [1] int32, number of live samples, 0 … R.
    criterion: name of an exit rule in `eefast.criteria`.
    exit_index: number of this exit, written for the samples that exit here.
    logits, confidence, exits: [N, K] float32, [N] float32, [N] int64; written for samples that exit only, with a rule
        logits and confidence for all live samples.
    rule: [9] float32 with the criterion "carried", else None, see `eefast.criteria.carry`: the rows of `logits` and
        `confidence` at the samples' positions, which differ, hold the answer so far, and are read unless left out.

    Returns the live list of the next exit, with full-size buffers so that no shape depends on data:
    rows, positions: [R] int32, the survivors first in their old order, then the others in reverse order (as CUB's
        DevicePartition: a single pass can place them before it knows how many survive).
    live: [1] int32, the number of survivors.

    Inference only. Raises `ValueError` where `criterion` is unknown or a gradient would be needed, `RuntimeError` where
    a shape, dtype or device does not fit, on the CPU also where an index is out of range.
    """
    criteria.get(criterion)
    refuse_gradient("features", features, "exit_head")
    return torch.ops.eefast.exit_head.default(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits, rule
    )
