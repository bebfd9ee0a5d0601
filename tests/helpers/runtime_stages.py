"""Stages of several kinds and what runs them, installed or not, for the tests of stages in other libraries."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from networks import Stage, lived_in
from torch import Tensor, nn

from eefast.runtimes import RUNTIMES, RuntimeStage, StageAndHead

INSTALLED = [
    pytest.param(
        name, marks=pytest.mark.skipif(bool(r.missing()), reason=f"{r.missing()}; or pip install 'eefast[{name}]'")
    )
    for name, r in RUNTIMES.items()
    if r.quick
]
"""The libraries that are quick to build, each skipped with its reason where it is not installed."""


def residual() -> nn.Module:
    block = Stage(
        lambda self, x: torch.relu(self.norm(self.conv(x)) + x),
        conv=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(4),
    )
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True), block)


def mobile() -> nn.Module:
    """Depthwise convolutions, Hardswish, SiLU, squeeze-and-excitation."""
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.Hardsigmoid())
    block = Stage(lambda self, x: x * self.gate(x), gate=gate)
    depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False)
    return nn.Sequential(nn.Conv2d(3, 6, 1), nn.SiLU(), depthwise, nn.BatchNorm2d(6), nn.Hardswish(), block)


def dense() -> nn.Module:
    """Concatenation, average pooling, a convolution between normalisations."""
    grow = Stage(
        lambda self, x: torch.cat([x, self.conv(torch.relu(self.norm(x)))], 1),
        norm=nn.BatchNorm2d(3),
        conv=nn.Conv2d(3, 2, 3, padding=1),
    )
    return nn.Sequential(grow, nn.AvgPool2d(2, 2), nn.Conv2d(5, 4, 1), nn.GELU())


STAGES: dict[str, Callable[[], nn.Module]] = {"residual": residual, "mobile": mobile, "dense": dense}


def stage(name: str) -> nn.Module:
    """The same weights in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return lived_in(STAGES[name](), 1)


class Fake:
    """A library that runs a stage as `answer` says, and takes `seconds` for each image."""

    def __init__(
        self,
        answer: Callable[[nn.Module, Tensor], Any] = lambda stage, x: stage(x),
        *,
        name: str = "Fake",
        quick: bool = True,
        absent: str = "",
        build: Callable[[], Any] = lambda: None,
        layout: torch.memory_format = torch.contiguous_format,
        seconds: float = 0.0,
    ) -> None:
        self.answer, self.name, self.quick, self.absent, self.before = answer, name, quick, absent, build
        self.layout, self.seconds = layout, seconds
        self.built = 0

    def missing(self) -> str:
        return self.absent

    def build(self, stage: nn.Module, example: Tensor, threads: int) -> nn.Module:
        self.before()
        self.built += 1
        return FakeStage(self, stage)


class FakeStage(nn.Module):
    def __init__(self, fake: Fake, stage: nn.Module) -> None:
        super().__init__()
        self.fake, self.stage, self.layout = fake, stage, fake.layout
        self.with_head = isinstance(stage, StageAndHead)
        self.sizes: list[int] = []
        self.library = fake.name

    def forward(self, x: Tensor) -> Any:
        assert x.is_contiguous(memory_format=self.layout)
        self.sizes.append(len(x))
        time.sleep(self.fake.seconds * len(x))
        return self.fake.answer(self.stage, x)


def in_a_library(folded: nn.Module, example: Tensor, note: Callable[[], object] = lambda: None) -> RuntimeStage:
    """A stage that PyTorch computes, in memory as libraries are given it; note: called in every run."""

    def run(features: Tensor, written: Sequence[Tensor]) -> None:
        note()
        made = folded(features)
        for part, own in zip(written, made if isinstance(made, tuple) else (made,), strict=True):
            part.copy_(own)

    made = folded(example)
    shapes = [part.shape[1:] for part in (made if isinstance(made, tuple) else (made,))]
    return RuntimeStage(run, folded, example, shapes, "a library")
