"""What an engine runs, and the plan that describes it: values, made while planning and never changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..system.openmp import all_threads


@dataclass(frozen=True)
class StagePlan:
    """One row of a plan's table: what runs for a stage and the exit after it.

    output_shape: (C, H, W) of the features.
    share: of all stages' MACs.
    kernel: what evaluates the exit; note: how the stage runs.
    time: of the seconds that all stages take, as planning measured them; None where it measured none.
    """

    output_shape: tuple[int, ...]
    share: float
    kernel: str
    note: str
    time: float | None = None


def with_times(stages: Sequence[StagePlan], seconds: Sequence[float]) -> tuple[StagePlan, ...]:
    """The rows with each stage's share of the seconds; unchanged where one has none."""
    if not all(seconds):
        return tuple(stages)
    return tuple(replace(row, time=part / sum(seconds)) for row, part in zip(stages, seconds, strict=True))


LEGEND = (
    "28×28 F(4×4) by 4: maps of 28×28, Winograd convolutions in tiles of 4×4, 4 images at a time; direct: no Winograd"
)


@dataclass(frozen=True)
class Plan:
    """How a network runs; `print(plan)` shows it. It only describes: copies and pickles of it are equal to it.

    engine: "reference", "compact" or "resident".
    device, dtype: where the stages run and in what dtype.
    criterion: name of the exit rule.
    reasons: why this engine, then what planning found out about it.
    stages: one row per exit.
    """

    engine: str
    device: torch.device
    dtype: torch.dtype
    criterion: str
    reasons: tuple[str, ...]
    stages: tuple[StagePlan, ...]

    @property
    def reason(self) -> str:
        """All reasons in one line."""
        return "; ".join(self.reasons)

    def __str__(self) -> str:
        timed = any(s.time is not None for s in self.stages)
        rows = [("exit", "features", "MACs", *["time"] * timed, "exit kernel", "stage")]
        for i, s in enumerate(self.stages):
            time = [] if s.time is None else [f"{s.time:.1%}"]
            rows.append((str(i), "×".join(map(str, s.output_shape)), f"{s.share:.1%}", *time, s.kernel, s.note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        dtype = str(self.dtype).removeprefix("torch.")
        legend = [LEGEND] if any("F(" in s.note for s in self.stages) else []
        return "\n".join([f"{self.engine} engine, {self.device}, {dtype}: {self.reason}", *table, *legend])


@dataclass(frozen=True)
class CompactStep:
    """What the compact engine runs for a stage and the exit after it.

    stage, head_convs: inference copies, features → features.
    conv: weight and bias of the head's last convolution where the exit kernel computes it, else None.
    weight, bias: the head's packed linear, see `eefast.planning.head_packing.pack_head`.
    flatten: the head reads the whole map instead of its mean.
    counted: the stage in a form that reads the number of its rows on the device: (features, rows or None, live) →
        features; None where it has none.
    through: the stage in a form that reads its features where the stage before left them: (features, rows, live) →
        features of every row in `rows`; None where it has none.
    chunk: rows that the stage takes at a time at most, None for any number.
    with_head: the stage also returns what the head's linear reads.
    """

    stage: nn.Module
    head_convs: nn.Module
    conv: tuple[Tensor, Tensor] | None
    weight: Tensor
    bias: Tensor
    flatten: bool
    counted: nn.Module | None = None
    chunk: int | None = None
    through: nn.Module | None = None
    with_head: bool = False

    @cached_property
    def layout(self) -> torch.memory_format:
        return layout_of(self.stage)

    @cached_property
    def takes_memory(self) -> bool:
        """Whether the stage writes what it returns into memory that it is given."""
        return getattr(self.stage, "takes_memory", False)

    def into(self, features: Tensor, memory: Callable[[torch.Size, torch.dtype], Tensor]) -> tuple[Tensor, Tensor]:
        """The stage on features in any layout: its features, in `memory` where it can write there; what the exit reads.

        The latter are the same features or, of a stage with its head, [N, C', 1, 1].
        """
        features = features.contiguous(memory_format=self.layout)
        made = self.stage(features, memory) if self.takes_memory else self._run(features)
        return made if self.with_head else (made, made)

    def run(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `into`, on features [N, C, H, W] in the stage's layout, in chunks that fit the caches."""
        if self.chunk is None or len(features) <= self.chunk:
            made = self._run(features)
            return made if self.with_head else (made, made)
        parts = [self._run(part) for part in features.split(self.chunk)]
        if not self.with_head:
            made = torch.cat(parts)
            return made, made
        of_stage, of_head = zip(*parts, strict=True)
        return torch.cat(of_stage), torch.cat(of_head)

    def _run(self, features: Tensor) -> Any:
        """In PyTorch with all threads, also where the exits have one; a library's stage has threads of its own."""
        if self.takes_memory:
            return self.stage(features)
        with all_threads():
            return self.stage(features)


def layout_of(stage: nn.Module) -> torch.memory_format:
    """Of the features that a stage reads without a copy; channels-last, unless it says another one."""
    return getattr(stage, "layout", torch.channels_last)


@dataclass(frozen=True)
class ResidentProgram:
    """What `ops.resident_forward` runs or, where there is `image`, `ops.resident_int8`, see there.

    algorithms, group_sizes: per section, the side of the Winograd tiles (0: direct) and the samples that go together.
    normalization: [2, C] scale and shift of uint8 images, where the kernel applies them.
    image: [2, C] multiplier and shift that make integers of pixels.
    """

    steps: Tensor
    maps: Tensor
    groups: Tensor
    weights: Tensor
    packed: Tensor
    bfloat16: bool
    algorithms: tuple[int, ...]
    group_sizes: tuple[int, ...]
    normalization: Tensor | None = None
    image: Tensor | None = None

    @property
    def takes_bytes(self) -> bool:
        """Whether the op takes the uint8 images of a network that has a normalization."""
        return self.normalization is not None or self.image is not None

    def run(
        self,
        images: Tensor,
        thresholds: Tensor,
        criterion: str,
        num_classes: int,
        threads: int = 0,
        seconds: Tensor | None = None,
        rule: Tensor | None = None,
        features: Tensor | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, confidence and exit index of prepared images [N, C, H, W], or of features; as of the op."""
        tables = self.steps, self.maps, self.groups, self.weights, self.packed, thresholds
        of_bytes = self.takes_bytes and images.dtype == torch.uint8
        images = images if images.is_cuda or of_bytes else images.float()
        last = criterion if rule is None else "carried", num_classes
        if self.image is not None:
            return ops.resident_int8.run(images, *tables, self.image, *last, threads, seconds, rule, features, before)
        normalization = self.normalization if of_bytes else None
        return ops.resident_forward.run(
            images, *tables, *last, self.bfloat16, threads, seconds, normalization, rule, features, before
        )
