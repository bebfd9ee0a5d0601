"""The compact engine: a batch per stage, one fused op per exit, the survivors are the batch of the next stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitResult
from ..system.openmp import one_thread
from .chunks import Kept, Pass
from .engine import Batch, PlannedEngine, Rule
from .parts import Before, Part, features_of, going_on, part_of
from .program import CompactStep, Plan
from .schedule import Chunk, OfEach, answers
from .stores import EagerStores, Results
from .streaming import ordered_on_cuda, stream_merging

CHUNK = 128
"""Images that begin together at most in a stream."""

LARGE_CHUNK = 64
"""Images that a stage takes at a time from which on images are small, so that `CHUNK` of them fit into memory."""

PYTORCH = "PyTorch"

LEAST = 8
"""Images of the largest chunk from which on merging survivors pays; single images gain nothing from company."""


class CompactEngine(PlannedEngine):
    """steps: what runs, one per exit. kept: memory for survivors, of which every call in progress takes one.

    in_one_thread: whether all but stages runs in the calling thread, see `system.openmp`.
    """

    def __init__(
        self, net: EarlyExitNet, plan: Plan, steps: Sequence[CompactStep], in_one_thread: bool = False
    ) -> None:
        super().__init__(net, plan)
        self.steps, self.in_one_thread = tuple(steps), in_one_thread
        self.kept: list[Kept] = []

    @property
    def survives_fork(self) -> bool:
        return all(getattr(step.stage, "survives_fork", True) for step in self.steps)

    def arithmetic(self) -> dict[str, str]:
        libraries = [getattr(step.stage, "library", PYTORCH) for step in self.steps]
        alike = len(set(libraries)) == 1
        return {**super().arithmetic(), "stages": libraries[0] if alike else ", ".join(libraries)}

    def prepare(self, x: Tensor) -> Tensor:
        """Also raises `RuntimeError` in a CUDA graph's capture, which waiting for a count would break."""
        if isinstance(x, Tensor) and capturing(x.device):
            raise RuntimeError(
                "the compact engine cannot be captured in a CUDA graph, since its host reads how many samples exit; "
                "call it outside of the capture (it has graphs of its own), or use engine='resident'"
            )
        return super().prepare(x)

    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        return self.run_eagerly(images, thresholds, rule)

    @torch.no_grad()
    def run_eagerly(self, images: Tensor, thresholds: Tensor, rule: Rule = None) -> ExitResult:
        """Stage by stage; the host waits at every exit."""
        # Each call in progress has memory of its own; on a GPU also those whose kernels are not done.
        try:
            kept = self.kept.pop()
        except IndexError:
            kept = Kept()
        with one_thread(self.in_one_thread):
            results = Results.empty(len(images), self.net)
            given = self.plan.criterion, thresholds, results, kept, self.rule_of(rule)
            Pass(self.steps, *given).run(self.own(images))
        # Not where something failed, since survivors would still wait there.
        if not images.is_cuda:
            self.kept.append(kept)
        return results.of(self.net)

    @torch.no_grad()
    def part(
        self, x: Tensor, thresholds: Tensor, first: int, last: int, rule: Rule = None, before: Before | None = None
    ) -> Part:
        """Features come in the order of the samples; survivors of chunks fill the next ones as in `run`."""
        results, reached = Results.empty(len(x), self.net), list[tuple[Tensor, Tensor]]()
        if before is not None:
            results.logits.copy_(before.logits)
            results.confidence.copy_(before.confidence)
        keeps = last < self.net.num_exits
        steps, memory = self.steps[: last + 1], Kept()
        run = Pass(steps, self.plan.criterion, thresholds, results, memory, rule, reached if keeps else None)
        with one_thread(self.in_one_thread):
            run.run(features_of(self.net, first, x, self.plan.dtype) if first else self.own(x), first)
        result = results.of(self.net)
        if not keeps:
            return Part(result)
        if not reached:
            shape = 0, *self.net.stage_costs[last].feature_shape
            reached.append((x.new_empty(shape, dtype=self.plan.dtype), memory.numbers(0, x.device)))
        features, positions = (torch.cat(parts) for parts in zip(*reached, strict=True))
        rows, order = positions.long().sort()
        goes_on = going_on(self.criterion, thresholds, last, result.confidence[rows], rows)
        return part_of(self.net, last, result, rows[goes_on], order[goes_on], features)

    @torch.no_grad()
    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """Survivors wait for those of up to four more batches, so that deep stages run on full batches.

        With new thresholds, or images of another size, that begins again.
        """
        yield from stream_merging(batches, self._chunk(), self._merged)

    def _chunk(self) -> int:
        """Images that begin together at most, so that survivors of two chunks fit before a stage."""
        largest = max(step.chunk or CHUNK for step in self.steps)
        return largest if largest < LARGE_CHUNK else CHUNK

    def _merged(self, chunks: Iterator[Chunk], size: int, thresholds: Tensor, rule: Rule) -> Iterator[ExitResult]:
        """Results of chunks of prepared images, at most `size` each, in order; survivors of several chunks merge."""
        if size < LEAST:
            for x in chunks:
                yield self.run_eagerly(*((x.images, x.thresholds) if isinstance(x, OfEach) else (x, thresholds)), rule)
            return
        with torch.inference_mode(False):
            given = self.net, self.plan, self.steps, 1, 2 * size, thresholds, self.rule_of(rule)
            stores = EagerStores(*given, in_one_thread=self.in_one_thread)
        results = answers(stores, chunks, lambda stage, most, expected: (True, expected))
        yield from ordered_on_cuda(results, self.plan.device) if self.plan.device.type == "cuda" else results


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
