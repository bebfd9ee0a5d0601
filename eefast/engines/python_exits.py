"""Features and the answers so far → answers and survivors of one exit, by a rule in Python."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import criteria

Entries = tuple[Tensor, Tensor, Tensor]
"""The live list: rows of the features, positions in the results, both [M] int32, and [1] int32 how many count."""


def exit_in_python(
    step: criteria.Step, exit_index: int, linear: tuple[Tensor, Tensor], threshold: Tensor | None, features: Tensor,
    entries: Entries, results: tuple[Tensor, Tensor, Tensor],
) -> Entries:  # fmt: skip
    """As `ops.exit_head`, with `step` in place of a table; what it writes and returns is the same.

    linear: weight [K + 1, C] and bias; features: [M, C, H, W]; results: logits [N, K], confidence and exits [N].
    """
    (rows, positions, live), (logits, confidence, exits) = entries, results
    number = int(live)
    place = positions[:number].long()
    out = F.linear(features[rows[:number].long()].float().mean((2, 3)), *linear)
    before = logits[place], confidence[place]
    answer, value = criteria.carry_on(step, exit_index, out[:, :-1], out[:, -1], *before)
    logits[place], confidence[place] = answer, value
    leaves = torch.ones_like(value, dtype=torch.bool)
    if threshold is not None:
        limit = threshold[place] if threshold.dim() else threshold
        leaves = value > limit
        leaves |= limit.isnan() if threshold.dim() else False
    exits[place[leaves]] = exit_index
    dead = torch.arange(number, len(rows), device=rows.device)
    order = torch.cat([(~leaves).nonzero()[:, 0], leaves.nonzero()[:, 0], dead])
    return rows[order], positions[order], live.new_tensor([number - int(leaves.sum())])
