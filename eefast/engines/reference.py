"""The reference engine: the network's plain forward pass, which defines the right answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..result import ExitResult
from .engine import Batch, PlannedEngine, Rule


class ReferenceEngine(PlannedEngine):
    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        current = self.net.criterion
        # Another thread may have changed it since, with thresholds that belong to it.
        criterion = current if current.name == self.plan.criterion else self.criterion
        return self.net.first_exits(images, thresholds, criterion, self.rule_of(rule))

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """One batch after the other."""
        run = torch.no_grad()(self.run)
        return (run(batch.images, batch.thresholds, batch.rule) for batch in batches)
