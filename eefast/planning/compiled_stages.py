"""Folded stage → the stage compiled by torch.compile at the sizes that are expected, in the time that a plan has."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.contexts import isolated
from ..runtimes.compiled import CompiledStage
from ..system.time_limits import within

SECONDS = 60.0
"""Longest time in which a plan has its stages compiled: the first takes half a minute where Inductor's cache is empty,
the others, whose kernels are like those of the first, a few seconds each.
"""


class CompileTime:
    """The time that is left to a plan; what exceeds it goes on in a thread, whose result is not used.

    seconds: 0 where nothing is to be compiled.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = self.left = seconds

    def compiled(self, stage: nn.Module, features: Tensor) -> nn.Module:
        """The stage, compiled for as many rows as `features` [N, C, H, W] has, other numbers of rows, and a single row.

        A graph's capture of any number of rows then compiles nothing more. Raises `TimeoutError` where the time is
        spent, and whatever torch.compile raises.
        """
        if self.left <= 0:
            raise TimeoutError(f"the {self.seconds:g} s that planning has for it are spent")
        if features.is_cuda:
            torch.cuda.synchronize(features.device)  # compiled in another thread, on that thread's stream

        def build() -> nn.Module:
            there: Any = torch.cuda.device(features.device) if features.is_cuda else nullcontext()
            with there, isolated(features.device):
                made = CompiledStage(stage)
                for part in (features, features[:1])[: len(features)]:
                    made(part.clone())  # a stage may change its input
            return made

        begin = time.perf_counter()
        try:
            return within(self.left, build)
        finally:
            self.left -= time.perf_counter() - begin
