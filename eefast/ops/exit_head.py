"""One exit for the whole live batch: pooling, logits, confidence, threshold, result write, survivor list."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import criteria
from .library import namespace

namespace.define(
    "exit_head(Tensor features, Tensor weight, Tensor bias, Tensor? threshold, Tensor rows, Tensor positions,"
    " Tensor live, str criterion, int exit_index, Tensor(a!) logits, Tensor(b!) confidence, Tensor(c!) exits)"
    " -> (Tensor, Tensor, Tensor)"
)


def reference(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`exit_head` in plain PyTorch: its oracle, its fallback and its documentation."""
    rule = criteria.get(criterion)
    alive = torch.arange(len(rows), device=rows.device) < live
    pooled = features[rows.where(alive, 0)].float().mean(dim=(2, 3)) if len(features) else features.float().mean((2, 3))
    with torch.autocast(features.device.type, enabled=False):
        out = torch.nn.functional.linear(pooled, weight, bias)
    value = rule.confidence(out[:, :-1], out[:, -1])
    leaves = alive if threshold is None else alive & rule.leaves(value, threshold)
    left = positions[leaves]
    logits[left], confidence[left], exits[left] = out[leaves, :-1], value[leaves], exit_index
    survives = alive & ~leaves
    order = survives.logical_not().to(torch.uint8).argsort(stable=True)
    return rows[order], positions[order], survives.sum(dtype=torch.int32).view(1)


namespace.impl("exit_head", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("eefast::exit_head")
def _fake(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(rows), rows.new_empty(1)


def _flops(features: Any, weight: Any, bias: Any, threshold: Any, rows: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * rows[0] * weight[0] * weight[1]


@cache
def register_flops() -> None:
    """Teach torch's FLOP counter this op; not done on import, since the counter imports triton."""
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(torch.ops.eefast.exit_head)(_flops)


def exit_head(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Evaluate one exit for all live samples, write the answers of those that leave, list those that survive.

    features: [M, C, H, W] float32, float16 or bfloat16, contiguous or channels-last.
    weight, bias: [K + 1, C] and [K + 1] float32: the class rows, then the confidence row.
    threshold: [] float32, compared as the criterion says; None at the final exit, where everybody leaves.
    rows, positions: [R] int32 each, the live list: row of `features` and place in the results of each live sample.
        Entries behind `live` are not read.
    live: [1] int32, number of live samples, 0 … R.
    criterion: name of an exit rule in `eefast.criteria`.
    exit_index: number of this exit, written for the samples that leave here.
    logits, confidence, exits: [N, K] float32, [N] float32, [N] int64; written at the positions of leaving samples only.

    Returns the live list of the next exit, with full-size buffers so that no shape depends on data:
    rows, positions: [R] int32, the survivors first in their old order, then all others in theirs.
    live: [1] int32, the number of survivors.
    """
    return torch.ops.eefast.exit_head.default(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits
    )
