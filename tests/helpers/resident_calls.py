"""Networks as arguments of `eefast::resident_forward`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from networks import Stage, images, lived_in, spread_thresholds
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast import zoo
from eefast.heads import ExitHead
from eefast.planning.layers import Lowered
from eefast.planning.lowering import lower
from eefast.planning.packing import program
from eefast.zoo.eenet8 import PreActivationBlock

op = torch.ops.eefast.resident_forward.default


@lru_cache(maxsize=3)
def lowered(net: eefast.EarlyExitNet) -> tuple[Lowered, tuple[dict, dict]]:
    return lower(net), ({}, {})


def tables(net: eefast.EarlyExitNet, algorithm: int = 0, group: int = 1, bfloat16: bool = False) -> tuple[Tensor, ...]:
    """The op's arguments between the images and the thresholds."""
    layers, packed = lowered(net)
    n = len(layers.sizes)
    p = program(layers, (algorithm,) * n, (group,) * n, bfloat16, packed[bfloat16])
    return p.steps, p.maps, p.groups, p.weights, p.packed


@torch.no_grad()
def network(
    name: str, seed: int, n: int, share: float = 0.4, criterion: str = "learned", **arguments: Any
) -> tuple[eefast.EarlyExitNet, Tensor]:
    """A random network, n images for it, and thresholds at which about `share` of them exit at each early exit."""
    net = lived_in(zoo.eenet(name, **{"num_exits": 2, **arguments}), seed).with_criterion(criterion)
    x = images(n, net.input_shape, seed)
    y = x
    for stage, head in zip(net.stages, net.heads, strict=True):
        # Deep random networks say large numbers, of which every confidence would be 0 or 1.
        y = stage(y)
        logits, _, row = head(y)
        for linear, out in ((head.classifier, logits), (head.confidence, row)):
            linear.weight /= out.std()
    spread_thresholds(net, x, share)
    return net, x


NAMES = ("images", "steps", "maps", "groups", "weights", "packed", "thresholds", "criterion", "num_classes")
NAMES += ("bfloat16", "threads", "seconds")


@lru_cache(maxsize=1)
def _victim() -> dict[str, Any]:
    """Arguments of a network with every kind of step: its first steps are convolutions, the image's and a Winograd."""
    stage = nn.Sequential(nn.Conv2d(3, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1), nn.MaxPool2d(2))
    second = nn.Sequential(PreActivationBlock(20, 24, 2, first=False), nn.MaxPool2d(3, 1, 1))
    heads = [ExitHead("pool", (20, 4, 4), 7, (3, 8, 8)), ExitHead("conv1", (24, 2, 2), 7, (3, 8, 8))]
    net = lived_in(eefast.EarlyExitNet([stage, second], heads, input_shape=(3, 8, 8)), 1)
    x = images(5, (3, 8, 8))
    spread_thresholds(net, x, 0.5)
    values = (x, *tables(net, 2, 2), net.thresholds, "learned", 7, False, 2, None)
    return dict(zip(NAMES, values, strict=True))


@lru_cache(maxsize=1)
def _victim_of_the_cpu() -> dict[str, Any]:
    """Arguments of a network with the steps that only the CPU has, in float32."""
    gate = {"pool": nn.AdaptiveAvgPool2d(1), "a": nn.Conv2d(20, 5, 1), "b": nn.Conv2d(5, 20, 1)}
    stage = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1), nn.SiLU(), nn.Conv2d(20, 20, 5, padding=2, groups=20), nn.Hardswish(),
        Stage(lambda s, x: x * s.b(s.a(s.pool(x)).relu()).sigmoid(), **gate),
    )  # fmt: skip
    joined = {"a": nn.Conv2d(20, 16, 1), "b": nn.Conv2d(20, 40, 3, 2, 1, groups=5), "c": nn.Conv2d(16, 9, 1, 2)}
    second = Stage(lambda s, x: torch.cat([s.b(x), s.c(F.gelu(s.a(x))), F.relu6(s.b(x))], 1), **joined)
    second.d = nn.Conv2d(89, 24, 1)
    second.run = lambda s, x, run=second.run: s.d(run(s, x))
    heads = [ExitHead("pool", (20, 8, 8), 7, (3, 8, 8)), ExitHead("conv1", (24, 4, 4), 7, (3, 8, 8))]
    net = lived_in(eefast.EarlyExitNet([stage, second], heads, input_shape=(3, 8, 8)), 1)
    x = images(5, (3, 8, 8))
    spread_thresholds(net, x, 0.5)
    values = (x, *tables(net, 0, 2), net.thresholds, "learned", 7, False, 2, None)
    return dict(zip(NAMES, values, strict=True))


def victim(of_the_cpu: bool = False) -> dict[str, Any]:
    """of_the_cpu: of the steps that CUDA and INT8 lack."""
    found = _victim_of_the_cpu() if of_the_cpu else _victim()
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in found.items()}
