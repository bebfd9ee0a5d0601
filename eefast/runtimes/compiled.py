"""Stage → the same stage compiled by torch.compile, for single images and for all other batch sizes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from .stage_and_head import StageAndHead


class Compiled:
    name, quick = "torch.compile", False

    def missing(self) -> str:
        return ""

    def build(self, stage: nn.Module, example: Tensor, threads: int) -> nn.Module:
        made = CompiledStage(stage)
        for n in (1, 2):
            made(example[torch.arange(n) % len(example)].contiguous(memory_format=torch.channels_last))
        return made


class CompiledStage(nn.Module):
    """layout: of the features that it reads without a copy. library, with_head: as of `RuntimeStage`."""

    layout, library = torch.channels_last, Compiled.name

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.with_head = isinstance(stage, StageAndHead)
        self._compiled: Any = torch.compile(stage, dynamic=True)

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        with torch.no_grad():
            return cast("Tensor | tuple[Tensor, Tensor]", self._compiled(features))
