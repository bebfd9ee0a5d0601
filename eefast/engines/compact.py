"""The compact engine: a batch per stage, one fused op per exit, the survivors are the batch of the next stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..result import ExitResult
from .engine import Batch, PlannedEngine
from .program import CompactStep, Plan
from .schedule import Chunk, OfEach, answers
from .stores import EagerStores, Results, exit_at
from .streaming import stream_merging

CHUNK = 128
"""Images that begin together at most in a stream."""

LEAST = 8
"""Images of the largest chunk from which on merging survivors pays; single images gain nothing from company."""


class CompactEngine(PlannedEngine):
    """steps: what runs, one per exit."""

    def __init__(self, net: EarlyExitNet, plan: Plan, steps: Sequence[CompactStep]) -> None:
        super().__init__(net, plan)
        self.steps = tuple(steps)

    def run(self, images: Tensor, thresholds: Tensor) -> ExitResult:
        return self.run_eagerly(images, thresholds)

    def run_eagerly(self, images: Tensor, thresholds: Tensor) -> ExitResult:
        """Stage by stage; the host waits at every exit."""
        n, device = len(images), images.device
        results = Results.empty(n, self.net)
        order = torch.arange(n, dtype=torch.int32, device=device)
        entries, survivors = (order, order, torch.full((1,), n, dtype=torch.int32, device=device)), n
        features = images.to(self.plan.dtype, memory_format=torch.channels_last)
        for i, step in enumerate(self.steps):
            if survivors == 0:
                break
            features = step.stage(features)
            threshold = thresholds[i] if i < self.net.num_exits else None
            rows, positions, live = exit_at(step, i, self.plan.criterion, threshold, features, entries, results)
            remaining = int(live)  # the one place where the host reads a count
            if 0 < remaining < survivors:
                arrived, features = features, torch.empty_like(features[:remaining])
                ops.gather_survivors.run(arrived, rows[:remaining], live, features)
            entries, survivors = (order[:remaining], positions[:remaining], live), remaining
        return results.of(self.net)

    @torch.no_grad()
    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """Survivors wait for those of up to four more batches, so that deep stages run on full batches.

        With new thresholds, or images of another size, that begins again.
        """
        yield from stream_merging(batches, self._chunk(), self._merged)

    def _chunk(self) -> int:
        """Images that begin together at most, so that survivors of two chunks fit before a stage."""
        return CHUNK

    def _merged(self, chunks: Iterator[Chunk], size: int, thresholds: Tensor) -> Iterator[ExitResult]:
        """Results of chunks of prepared images, at most `size` each, in order; survivors of several chunks merge."""
        if size < LEAST:
            for x in chunks:
                yield self.run_eagerly(*((x.images, x.thresholds) if isinstance(x, OfEach) else (x, thresholds)))
            return
        with torch.inference_mode(False):
            stores = EagerStores(self.net, self.plan, self.steps, 1, 2 * size, thresholds)
        yield from answers(stores, chunks, lambda stage, most, expected: (True, expected))
