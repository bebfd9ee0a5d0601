"""A stage in PyTorch and another library's run of it → one module that answers as the stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..system.openmp import all_threads
from .stage_and_head import StageAndHead

Run = Callable[[Tensor, Sequence[Tensor]], None]
"""(features [N, C, H, W], what the stage makes of them), all contiguous float32, N ≥ 1: writes the latter."""

Memory = Callable[[torch.Size, torch.dtype], Tensor]
"""Shape and dtype → a contiguous tensor with any content."""


class Runtime(Protocol):
    """A library that can run stages on the CPU in float32.

    name: for people. quick: whether `build` takes less than a second, so that "auto" tries it.
    """

    name: str
    quick: bool

    def missing(self) -> str:
        """What is not installed, and how to install it; "" where all is."""

    def build(self, stage: nn.Module, example: Tensor, threads: int) -> nn.Module:
        """A stage that answers as `stage` does.

        stage: an inference copy in float32, channels-last, which stays as it is; or one with its head.
        example: features [N, C, H, W] float32; any N comes later, images of another size rarely.
        threads: that work on one call. Any number of Python threads may call at a time.
        Raises whatever the library raises.
        """


class RuntimeStage(nn.Module):
    """A stage that another library runs for features of one size; for other sizes it is `folded`, in PyTorch.

    layout: of the features that it reads without a copy, and of those that it returns. takes_memory: for the latter.
    survives_fork: whether it runs in a forked process, where the library's threads are missing.
    library: its name, for people. with_head: whether it is a `StageAndHead`.
    loses_nan: whether the library makes numbers of NaN, so that samples with some are left to `folded`.
    """

    layout, takes_memory, survives_fork = torch.contiguous_format, True, False
    loses_nan = False

    def __init__(
        self, run: Run, folded: nn.Module, example: Tensor, shapes: Sequence[Sequence[int]], library: str
    ) -> None:
        """folded: a stage, or a `StageAndHead`. shapes: (C', H', W') of all that comes of features like `example`."""
        super().__init__()
        self.run, self.folded, self.library = run, folded, library
        self.with_head = isinstance(folded, StageAndHead)
        self._before, self._after = example.shape[1:], [torch.Size(shape) for shape in shapes]

    def forward(self, features: Tensor, memory: Memory | None = None) -> Tensor | tuple[Tensor, ...]:
        """memory: where the features that it returns are to be; by default new."""
        if features.shape[1:] != self._before or features.dtype != torch.float32 or len(features) == 0:
            with all_threads():
                return self.folded(features.contiguous(memory_format=torch.channels_last))
        shapes = [torch.Size((len(features), *shape)) for shape in self._after]
        first = features.new_empty(shapes[0]) if memory is None else memory(shapes[0], features.dtype)
        made = first, *(features.new_empty(shape) for shape in shapes[1:])
        features = features.contiguous().resolve_neg()
        self.run(features, made)
        if self.loses_nan:
            self._keep_nan(features, made)
        return made if self.with_head else first

    def _keep_nan(self, features: Tensor, made: Sequence[Tensor]) -> None:
        """Infinities count, too: the stage may make NaN of them. A sum has one where a number has; it is quick."""
        broken = features.flatten(1).sum(1).isfinite().logical_not_()
        if broken.any():
            with all_threads():
                found = self.folded(features[broken].contiguous(memory_format=torch.channels_last))
            for part, own in zip(made, found if self.with_head else (found,), strict=True):
                part[broken] = own
