"""Stages that get fused: small convolutions, all spellings of additions and ReLUs, a cuDNN in plain PyTorch."""

from __future__ import annotations

import operator
from collections import Counter

import pytest
import torch
from networks import lived_in
from torch import Tensor, fx, nn
from torch.nn import functional as F

from eefast.planning import fusing
from eefast.planning.folding import fold_stage
from eefast.planning.fusing import fuse_convolutions
from eefast.zoo.resnets import trunk

DOUBLE = torch.float64
HALVES = [torch.float16, torch.bfloat16]


def conv(inputs: int = 3, outputs: int = 3, kernel: int = 3, stride: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, **{"padding": kernel // 2, **more})


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def folded_and_fused(stage: nn.Module, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, fx.GraphModule, int, int]:
    folded, what = fold_stage(nn.Sequential(lived_in(stage, 1)), dtype)
    assert what == "folded"
    fused, count, total = fuse_convolutions(folded)
    assert isinstance(fused, fx.GraphModule)
    return folded, fused, count, total


def kinds(module: fx.GraphModule) -> Counter[str]:
    """What the nodes of a graph call, inputs and outputs left out."""
    return Counter(
        type(module.get_submodule(node.target)).__name__ if node.op == "call_module" else str(node.target)
        for node in module.graph.nodes
        if node.op not in ("placeholder", "output")
    )


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


RELUS = {
    "module": lambda s, x: s.relu(x),
    "module in place": lambda s, x: s.relu_in_place(x),
    "functional": lambda s, x: F.relu(x),
    "functional in place": lambda s, x: F.relu(x, inplace=True),
    "functional in place, by position": lambda s, x: F.relu(x, True),
    "function": lambda s, x: torch.relu(x),
    "function in place": lambda s, x: torch.relu_(x),
    "method": lambda s, x: x.relu(),
    "method in place": lambda s, x: x.relu_(),
}
ADDITIONS = {
    "operator": lambda a, b: a + b,
    "operator in place": operator.iadd,
    "function": torch.add,
    "function with alpha": lambda a, b: torch.add(a, b, alpha=1),
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
}


class Cudnn:
    """Plain PyTorch under the names of cuDNN's fused convolutions, and a record of what they were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.add_relu)
        monkeypatch.setattr(fusing, "on_cuda", lambda x: True)

    def relu(self, x: Tensor, weight: Tensor, bias: Tensor, *geometry: object) -> Tensor:
        self.calls.append("relu")
        return self._sum(x, weight, bias, geometry).relu().to(x.dtype)

    def add_relu(self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: object) -> Tensor:
        self.calls.append("add_relu")
        conv = self._sum(x, weight, bias, geometry)
        assert alpha == 1
        assert z.shape == conv.shape
        assert z.dtype == x.dtype
        return (conv + z.double()).relu().to(x.dtype)

    @staticmethod
    def _sum(x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[object, ...]) -> Tensor:
        assert bias is not None  # else PyTorch fills one at every call
        assert bias.dtype == weight.dtype == x.dtype
        return F.conv2d(x.double(), weight.double(), bias.double(), *geometry)


def basic_block() -> nn.Module:
    return lived_in(trunk(20, 3)[1][0], 1)


def on_gpu(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.cuda().to(dtype, memory_format=torch.channels_last)
