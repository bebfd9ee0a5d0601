"""Outputs of all exits → the cuts that thresholds can make, and right answers and cost of any choice of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import criteria
from ..result import ExitOutput
from .outputs import check_labels


class Cuts:
    """Per early exit, the sets of samples that a threshold can let exit: the k most confident ones, without ties.

    A cut is one such k, 0 … N; `picks` is the index of one cut per early exit. Totals are [2, …] float64: the number of
    right answers and the sum of costs over all samples.

    outcome: [n + 1, 2, N] float64: whether each exit is right about each sample, and the exit's cost.
    order, rank: per exit, the samples from the most to the least confident, and the place of each sample in that order.
    sizes: per exit, the number of samples that each of its cuts lets exit, ascending.
    thresholds: per exit, the threshold that makes each of its cuts.
    Raises `ValueError` without samples or early exits, for labels of another shape than [N], and for an exit
    whose confidences are all NaN.
    """

    def __init__(self, outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str) -> None:
        if len(labels) == 0 or len(outputs) < 2:
            raise ValueError(
                f"{len(labels)} samples, {len(outputs) - 1} early exits: thresholds need at least one of both"
            )
        check_labels(labels, len(outputs[0].logits))
        rule = criteria.get(criterion)
        self.num_exits, self.num_samples = len(outputs) - 1, len(labels)
        right = torch.stack([out.logits.argmax(dim=1) == labels for out in outputs]).double()
        self.outcome = torch.stack([right, cost.double().cpu()[:, None].expand_as(right)], dim=1)
        self.order, self.rank, self.sizes, self.thresholds = [], [], [], []
        sign = 1.0 if rule.comparison == ">" else -1.0
        for out in outputs[:-1]:
            score = rule.confidence(out.logits, out.confidence_logit) * sign
            score = score.masked_fill(score.isnan(), -torch.inf)
            score, order = score.sort(descending=True, stable=True)
            known = score[score > -torch.inf]
            if len(known) == 0:
                raise ValueError("an early exit has no confidence that is a number; was the network trained?")
            # The outermost are 1 beyond all confidences: finite thresholds at which no sample exits, or every one does.
            # From 2²⁴ on, where a float32 plus 1 may be itself, they are the next numbers.
            end = known.new_tensor(torch.inf)
            highest, lowest = known[:1].nextafter(end), known[-1:].nextafter(-end)
            between = (known[:-1] + known[1:]) / 2
            edges = torch.cat([highest.maximum(known[:1] + 1), between, lowest.minimum(known[-1:] - 1)])
            apart = torch.ones(len(edges), dtype=torch.bool)
            apart[1:-1] = (known[:-1] > edges[1:-1]) & (edges[1:-1] > known[1:])
            self.order.append(order)
            self.rank.append(order.argsort())
            self.sizes.append(apart.nonzero().flatten())
            self.thresholds.append(edges[apart] * sign)

    def thresholds_of(self, picks: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(values[pick]) for values, pick in zip(self.thresholds, picks, strict=True))

    def selected(self, picks: Sequence[int], i: int) -> Tensor:
        """[N] bool: the samples that exit i lets exit, if they reach it."""
        return self.rank[i] < self.sizes[i][picks[i]]

    def outcome_from(self, picks: Sequence[int], i: int) -> Tensor:
        """[2, N] outcome of every sample that has not exited before exit i."""
        outcome = self.outcome[-1]
        for k in reversed(range(i, self.num_exits)):
            outcome = self.outcome[k].where(self.selected(picks, k), outcome)
        return outcome

    def totals(self, picks: Sequence[int]) -> Tensor:
        """[2] totals of one choice of cuts."""
        return self.outcome_from(picks, 0).sum(dim=1)

    def sweep(self, i: int, arrives: Tensor, later: Tensor) -> Tensor:
        """Totals [2, cuts of exit i] of the samples that reach exit i, for each of its cuts.

        arrives: [N] bool, which samples reach it; later: [2, N] their outcome if they do not exit there.
        """
        # Not by indexing, which takes five times as long.
        gained = ((self.outcome[i] - later) * arrives).gather(1, self.order[i].expand(2, -1)).cumsum(dim=1)
        return (later * arrives).sum(dim=1, keepdim=True) + nn.functional.pad(gained, (1, 0))[:, self.sizes[i]]

    def sweep_pair(self, picks: Sequence[int], i: int, j: int, columns: tuple[Tensor, Tensor]) -> Tensor:
        """Totals [2, a, b] for all pairs of a cuts of exit i and b cuts of exit j > i, the other exits as in `picks`.

        columns: indices of these cuts, ascending. A sample that exits at one cut of an exit does so at every larger
        one, so two-dimensional running sums of the samples' gains count each of them wherever it exits.
        """
        before, between, stays = self._around(picks, i, j)
        late = self.outcome_from(picks, j + 1)
        # Each sample's first cut of both exits, among `columns`, at which it exits; one past the end if at none.
        first = [
            torch.bucketize(self.rank[e], self.sizes[e][c], right=True) for e, c in zip((i, j), columns, strict=True)
        ]
        rows, width = (len(c) + 1 for c in columns)
        arrives, reaches = ~before, ~(before | between)
        cell = first[0] * width + first[1]
        base = self.outcome_from(picks, 0).where(before, stays).sum(dim=1)
        tables = []
        for part in range(2):
            at_i = torch.bincount(first[0], (self.outcome[i, part] - stays[part]) * arrives, rows).cumsum(0)
            at_j = torch.bincount(cell, (self.outcome[j, part] - late[part]) * reaches, rows * width)
            at_j = at_j.view(rows, width).cumsum(1)
            # Of the samples that would exit at j, those that have exited at i do not.
            tables.append(base[part] + at_i[:, None] + at_j.sum(0) - at_j.cumsum(0))
        return torch.stack(tables)[:, :-1, :-1]

    def _around(self, picks: Sequence[int], i: int, j: int) -> tuple[Tensor, Tensor, Tensor]:
        """Samples that exit before exit i [N] or between i and j [N], and outcomes [2, N] without the exits i and j."""
        before = torch.zeros(self.num_samples, dtype=torch.bool)
        for k in range(i):
            before |= self.selected(picks, k)
        between = torch.zeros_like(before)
        stays = self.outcome_from(picks, j + 1)
        for k in reversed(range(i + 1, j)):
            selected = self.selected(picks, k)
            between |= selected
            stays = self.outcome[k].where(selected, stays)
        return before, between, stays
