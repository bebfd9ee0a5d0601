"""The resident engine: images → one op that carries every sample to its exit → answers; no batch is compacted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..result import ExitResult
from .engine import Batch, PlannedEngine
from .program import Plan, ResidentProgram
from .streaming import stream_in_threads, stream_on_cuda


class ResidentEngine(PlannedEngine):
    def __init__(self, net: EarlyExitNet, plan: Plan, program: ResidentProgram) -> None:
        super().__init__(net, plan)
        self.program = program

    def prepare(self, x: Tensor) -> Tensor:
        """Where the kernel applies the normalization, uint8 images are not converted here."""
        if self.program.normalization is None:
            return super().prepare(x)
        self.net.check_images(x, self.plan.dtype, self.weight)
        return x

    def run(self, images: Tensor, thresholds: Tensor, threads: int = 0) -> ExitResult:
        """threads: as in `ops.resident_forward`."""
        net, program = self.net, self.program
        images = images if images.is_cuda else images.float()
        normalization = program.normalization if images.dtype == torch.uint8 else None
        arguments = program.arguments(thresholds, self.plan.criterion, net.num_classes)
        logits, confidence, exits = ops.resident_forward.run(images, *arguments, threads, None, normalization)
        return ExitResult(logits, exits, confidence, net.cost.index_select(0, exits))

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """Reads a few batches ahead and keeps all threads, or the whole GPU, busy across the batches' borders."""
        if self.plan.device.type == "cuda":
            return stream_on_cuda(batches, torch.no_grad()(self.run), self.plan.device)
        return stream_in_threads(batches, torch.no_grad()(partial(self.run, threads=1)))
