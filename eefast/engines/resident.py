"""The resident engine: images → one op that carries every sample to its exit → answers; no batch is compacted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitResult
from .engine import Batch, PlannedEngine, Rule
from .program import Plan, ResidentProgram
from .streaming import stream_in_threads, stream_on_cuda


class ResidentEngine(PlannedEngine):
    def __init__(self, net: EarlyExitNet, plan: Plan, program: ResidentProgram) -> None:
        super().__init__(net, plan)
        self.program = program

    def prepare(self, x: Tensor) -> Tensor:
        """Where the kernel applies the normalization, uint8 images are not converted here."""
        if not (self.program.takes_bytes and isinstance(x, Tensor) and x.dtype == torch.uint8):
            return super().prepare(x)
        self.net.check_images(x, self.plan.dtype, self.weight)
        return x

    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None, *, threads: int = 0) -> ExitResult:
        """threads: as in `ops.resident_forward`."""
        arguments = images, thresholds, self.plan.criterion, self.net.num_classes, threads
        table = self.rule_of(rule)
        assert table is None or isinstance(table, Tensor)
        logits, confidence, exits = self.program.run(*arguments, rule=table)
        return ExitResult(logits, exits, confidence, self.net.cost.index_select(0, exits))

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """Reads a few batches ahead and keeps all threads, or the whole GPU, busy across the batches' borders."""
        if self.plan.device.type == "cuda":
            return stream_on_cuda(batches, torch.no_grad()(self.run), self.plan.device)
        return stream_in_threads(batches, torch.no_grad()(partial(self.run, threads=1)))
