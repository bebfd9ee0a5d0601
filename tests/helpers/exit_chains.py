"""Every exit of a network by an op like `exit_head`, one call each, on maps whose channels are given outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rule_cases import in_float64
from torch import Tensor

from eefast import rules

MORE = 3  # places in the results that belong to no sample


def chain(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]], outputs: Tensor, thresholds: Sequence[float] | Tensor,
    table: Tensor | None, criterion: str = "carried", poison: float = math.nan,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits [N, K], confidence [N], exits [N].

    outputs: [N, n + 1, K + 1] float32, of which no sum rounds: maps have one pixel, the weight is the unit matrix.
    thresholds: n, or [n, N], of each sample.  table: [n + 1, 9] of a rule that carries.
    poison: what the results, whose rows are in random order, held before.
    """
    samples, count, width = outputs.shape
    places = torch.randperm(samples + MORE, generator=torch.Generator().manual_seed(samples))[:samples].int()
    results = torch.full((samples + MORE, width - 1), poison), torch.full((samples + MORE,), poison)
    exits = torch.full((samples + MORE,), -1)
    limits = torch.as_tensor(thresholds)
    if limits.dim() == 2:
        limits = limits.new_zeros(count - 1, samples + MORE).index_copy(1, places.long(), limits)
    live, lists = torch.tensor([samples]).int(), (torch.arange(samples).int(), places)
    for i in range(count):
        features = outputs[:, i, :, None, None].contiguous()
        more: tuple[Any, ...] = () if table is None else (table[i],)
        limit = limits[i] if i < count - 1 else None
        *lists, live = run(
            features, torch.eye(width), torch.zeros(width), limit, *lists, live, criterion, i, *results, exits, *more
        )
    assert int(live) == 0
    untouched = torch.ones(samples + MORE, dtype=torch.bool).index_fill(0, places.long(), False)
    assert (exits[untouched] == -1).all()
    for result in results:
        nobody = result[untouched]
        assert torch.equal(nobody.nan_to_num(1.5), torch.full_like(nobody, poison).nan_to_num(1.5))
    return tuple(x[places.long()] for x in (*results, exits))  # type: ignore[return-value]


def spread(outputs: Tensor, rule: rules.Rule) -> list[float]:
    """Thresholds by which two samples of three go on at every exit."""
    return np.quantile(in_float64(outputs, rule)[1][:-1], 2 / 3, axis=1).tolist()
