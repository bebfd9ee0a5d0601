"""The reference engine: the network's plain forward pass, which defines the right answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .. import criteria
from ..result import ExitResult
from .engine import Batch, PlannedEngine


class ReferenceEngine(PlannedEngine):
    def run(self, images: Tensor, thresholds: Tensor, rule: Tensor | None = None) -> ExitResult:
        criterion, planned = self.net.criterion, self.plan.criterion
        # Another thread may have changed it since, with thresholds that belong to it.
        return self.net.first_exits(
            images, thresholds, criterion if criterion.name == planned else criteria.get(planned), self.rule_of(rule)
        )

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """One batch after the other."""
        run = torch.no_grad()(self.run)
        return (run(batch.images, batch.thresholds, batch.rule) for batch in batches)
