"""The reference engine: the network's plain forward pass, which defines the right answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .. import criteria
from ..result import ExitResult
from .engine import Batch, PlannedEngine, Rule
from .parts import Before, Part, features_of, going_on, part_of


class ReferenceEngine(PlannedEngine):
    @torch.no_grad()
    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        current = self.net.criterion
        # Another thread may have changed it since, with thresholds that belong to it.
        criterion = current if current.name == self.plan.criterion else self.criterion
        return self.net.first_exits(self.own(images), thresholds, criterion, self.rule_of(rule))

    @torch.no_grad()
    def part(
        self, x: Tensor, thresholds: Tensor, first: int, last: int, rule: Rule = None, before: Before | None = None
    ) -> Part:
        """Stage by stage, as `EarlyExitNet.first_exits`."""
        net, criterion = self.net, self.criterion
        if first and len(net.input_shape) == 2:
            x = x.squeeze(2)
        x = features_of(net, first, x, self.plan.dtype) if first else self.own(x)
        x = x.contiguous()
        rows = torch.arange(len(x), device=x.device)
        if before is None:
            before = Before(x.new_zeros(len(x), net.num_classes, dtype=torch.float32), x.new_zeros(len(x)).float())
        logits, confidence, exits = before.logits.clone(), before.confidence.clone(), torch.full_like(rows, last)
        for i in range(first, last + 1):
            if not len(rows):
                break
            x = net.stages[i](x)
            out = net.heads[i](x)
            if rule is None:
                answer, value = out.logits.float(), criterion.confidence(out.logits, out.confidence_logit)
            else:
                so_far = logits[rows], confidence[rows]
                answer, value = criteria.carry_on(rule, i, out.logits, out.confidence_logit, *so_far)
            logits[rows], confidence[rows], exits[rows] = answer, value, i
            if i < net.num_exits:
                goes_on = going_on(criterion, thresholds, i, value, rows)
                x, rows = x[goes_on], rows[goes_on]
        result = ExitResult(logits, exits, confidence, net.cost[exits])
        if last == net.num_exits:
            return Part(result)
        x = x if len(rows) else x.new_empty(0, *net.stage_costs[last].feature_shape)
        return part_of(net, last, result, rows, torch.arange(len(rows), device=x.device), x)

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """One batch after the other."""
        return (self.run(batch.images, batch.thresholds, batch.rule) for batch in batches)
