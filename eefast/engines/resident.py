"""The resident engine: images → one op that carries every sample to its exit → answers; no batch is compacted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..model import EarlyExitNet
from ..ops import resident_loop
from ..result import ExitResult
from .engine import Batch, PlannedEngine, Rule
from .lent_memory import LentMemory
from .parts import Before, Part, answer_broken
from .program import Plan, ResidentProgram
from .program_parts import map_sizes, part
from .streaming import stream_in_threads, stream_on_cuda


class ResidentEngine(PlannedEngine):
    """program: what runs. repack: Winograd tiles per section, see `ResidentProgram.algorithms` → the same network as a
    program with these; None where there is no choice.
    """

    def __init__(
        self,
        net: EarlyExitNet,
        plan: Plan,
        program: ResidentProgram,
        repack: Callable[[tuple[int, ...]], ResidentProgram] | None = None,
    ) -> None:
        super().__init__(net, plan)
        self.program = program
        self._repack = repack
        self._parts: dict[tuple[int, int], ResidentProgram] = {}
        self._stored: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._memory = LentMemory()
        self._repacked: dict[tuple[int, ...], ResidentEngine] = {}

    def prepared(self, x: Tensor) -> Tensor:
        """Where the kernel applies the normalization, uint8 images are not converted here."""
        if not (self.program.takes_bytes and isinstance(x, Tensor) and x.dtype == torch.uint8):
            return super().prepared(x)
        self.net.check_images(x, self.plan.dtype, self.weight)
        return x

    def run(self, images: Tensor, thresholds: Tensor, rule: Rule = None, *, threads: int = 0) -> ExitResult:
        """threads: as in `ops.resident_forward`."""
        arguments = images, thresholds, self.plan.criterion, self.net.num_classes, threads
        table = self.rule_of(rule)
        assert table is None or isinstance(table, Tensor)
        logits, confidence, exits = self.program.run(*arguments, rule=table)
        return self._answered(logits, exits, confidence)

    def _answered(self, logits: Tensor, exits: Tensor, confidence: Tensor) -> ExitResult:
        cost = self.net._buffers["cost"]  # as an attribute it takes as long as the selection
        assert cost is not None
        return ExitResult(logits, exits, confidence, cost.index_select(0, exits))

    def part(
        self, x: Tensor, thresholds: Tensor, first: int, last: int, rule: Rule = None, before: Before | None = None
    ) -> Part:
        """By the rows of the program's tables that compute these stages, so that answers keep their bits."""
        net = self.net
        assert rule is None or isinstance(rule, Tensor)
        logits, confidence, exits, features = self.run_part(
            x, thresholds[first : last + 1], first, last, rule=rule, before=before
        )
        if features is None:
            exits += first
            return Part(self._answered(logits, exits, confidence))
        # By Python's lists: an op costs more where its code has left the cache.
        taken, stop = exits.tolist(), last - first
        going = [row for row, exit_index in enumerate(taken) if exit_index > stop]
        rows, places = torch.tensor(going, dtype=torch.int64), [taken[row] - stop - 1 for row in going]
        # A NaN among pixels, for which there are no integers.
        broken = exits < 0 if self.program.image is not None else None
        exits = exits.clamp_(0, stop)
        result = self._answered(logits, exits.add_(first) if first else exits, confidence)
        if broken is not None and broken.any():
            answer_broken(net, result, broken)
        return Part(result, rows, places, features)

    def run_part(
        self, x: Tensor, thresholds: Tensor, first: int, last: int, threads: int = 0, rule: Tensor | None = None,
        before: Before | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Stages first … last in one call of the op: logits [N, K], confidence [N], exits [N] int64 and features.

        x, rule, before: as of `part`. thresholds: of the early exits among first … last alone, which are 0 … last -
        first in the result. features: those after stage `last` of the samples that go on, whose exit is last - first +
        1 + their row there; None after the final stage. threads: as in `ops.resident_forward`.

        Raises `ValueError` where the program cannot stop there.
        """
        program, floats = self.program_part(first, last), self.program.image is None
        features = None
        if last < self.net.num_exits:
            key = first, last, *x.shape[2:]
            if key not in self._stored:
                stored = self.net.stage_costs[last].feature_shape[0]
                self._stored[key] = stored, *map_sizes(program, *x.shape[2:])[-1]
            channels, height, width = self._stored[key]
            dtype = np.float32 if floats else np.uint8
            features = self._memory.lend((len(x), height, width, channels), dtype).permute(0, 3, 1, 2)
        if first and floats:
            x = x.float()
        rows = None if rule is None else rule[first : last + 2]
        state = None if before is None else torch.cat([before.logits, before.confidence[:, None]], 1)
        arguments = x, thresholds, self.plan.criterion, self.net.num_classes, threads
        return *program.run(*arguments, rule=rows, features=features, before=state), features

    @property
    def has_loops(self) -> bool:
        """Whether `loop` makes one: on a CPU, in C++."""
        return resident_loop.available and self.plan.device.type == "cpu"

    def loop(self, shape: Sequence[int], rule: Rule, workers: int) -> resident_loop.ResidentLoop:
        """`workers` threads that answer prepared images of this shape one by one; rule: that of `rule_of`."""
        program, net = self.program, self.net
        assert rule is None or isinstance(rule, Tensor)
        return resident_loop.ResidentLoop(
            (program.steps, program.maps, program.groups, program.packed), shape, net.num_exits,
            self.plan.criterion if rule is None else "carried", net.num_classes, program.bfloat16, program.image, rule,
            workers,
        )  # fmt: skip

    def program_part(self, first: int, last: int) -> ResidentProgram:
        """The program of stages first … last; `ValueError` where the program cannot be cut there."""
        if self.plan.device.type == "cuda":
            raise ValueError(
                "the resident engine on CUDA carries every image to its exit in one kernel, so that it cannot stop "
                "between exits; use engine='compact'"
            )
        if (first, last) not in self._parts:
            channels = [cost.feature_shape[0] for cost in self.net.stage_costs]
            self._parts[first, last] = part(self.program, first, last, channels)
        return self._parts[first, last]

    def arithmetic(self) -> dict[str, str]:
        return self._arithmetic

    @cached_property
    def _arithmetic(self) -> dict[str, str]:
        found = super().arithmetic()
        if self.plan.device.type == "cuda":
            return found
        if self.program.image is not None:
            return {**found, "dtype": "int8"}  # the same on every machine
        dtype = "bfloat16" if self.program.bfloat16 else "float32"
        winograd = ",".join(map(str, self.program.algorithms))
        return {**found, "dtype": dtype, "kernels": ops.instruction_set(), "winograd": winograd}

    def with_arithmetic(self, arithmetic: dict[str, str]) -> ResidentEngine:
        """The engine that computes as `arithmetic` says where only Winograd's tiles differ, else this one."""
        mine = self.arithmetic()
        known = arithmetic.keys() == mine.keys() and self._repack is not None
        if not known or any(arithmetic[key] != mine[key] for key in mine if key != "winograd"):
            return self
        try:
            algorithms = tuple(int(side) for side in arithmetic["winograd"].split(","))
        except ValueError:
            return self
        if algorithms == self.program.algorithms or len(algorithms) != len(self.program.algorithms):
            return self
        if not set(algorithms) <= {0, 2, 4}:
            return self
        if algorithms not in self._repacked:
            assert self._repack is not None
            self._repacked[algorithms] = ResidentEngine(self.net, self.plan, self._repack(algorithms))
        return self._repacked[algorithms]

    def stream(self, batches: Iterable[Batch]) -> Iterator[ExitResult]:
        """Reads a few batches ahead and keeps all threads, or the whole GPU, busy across the batches' borders."""
        if self.plan.device.type == "cuda":
            return stream_on_cuda(batches, self.run, self.plan.device)
        return stream_in_threads(batches, partial(self.run, threads=1))
