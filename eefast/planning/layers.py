"""What a network is made of for the resident engine: layers between maps, and what they compute in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import Activation, Kind
from ..ops.resident_steps import activated, joined

ADDITION: Any = "addition"
"""Kind of a layer that adds `residual` to `source`, until `layer_passes` makes it part of a convolution."""


@dataclass
class Layer:
    """One step from value to value; values are numbered, 0 is the image, and each is written once.

    source, residual: the values that it reads; residual -1: none. The residual of a JOIN is what its map holds before,
        the same map as its target.
    target: the value that it writes, or the number of an exit.
    weight, bias: of a convolution, an affine map or an exit.
    groups: of a convolution; channel: where a JOIN writes. An affine map reads as many channels as it has weights.
    row: whether a window is one row high and pads no rows.
    head: whether it is one of a head's, whose maps only its exit reads: these stay in the section of the features.
    moves: whether an affine map takes its source, one pixel, to the next section.
    section: number of map sizes before the target's, but for those of heads.
    """

    kind: Kind
    source: int
    target: int
    residual: int = -1
    activation: Activation = Activation.NONE
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    bias: Tensor = field(default_factory=lambda: torch.empty(0))
    section: int = 0
    groups: int = 1
    channel: int = 0
    row: bool = False
    head: bool = False
    moves: bool = False

    @property
    def resizes(self) -> bool:
        return self.kind in (Kind.CONVOLUTION, Kind.MAX_POOL) and (
            self.stride != 1 or self.kernel != 2 * self.padding + 1
        )

    @property
    def window(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Kernel and padding, each (rows, columns)."""
        return ((1, self.kernel), (0, self.padding)) if self.row else ((self.kernel,) * 2, (self.padding,) * 2)

    @property
    def allows_winograd(self) -> bool:
        """Whether Winograd can compute it: along both axes, or, where its windows are one row high, along rows."""
        able = self.kind == Kind.CONVOLUTION and self.kernel == 3 and not self.resizes
        return able and self.groups == 1 and self.source != 0

    def algorithm(self, side: int) -> int:
        """Side of its Winograd tiles, 0: direct, where its section is to have tiles of `side`."""
        return side if self.allows_winograd else 0

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it computes with, in the order in which the reference of the op reads it."""
        return self.weight, self.bias


@dataclass
class IntegerLayer(Layer):
    """A layer on maps of integers 0 … 255, see `eefast.modules.integer_maps`.

    A convolution has weight int8, bias int32, scale float32 [O] and ratio float32 [], of the residual, as
    `eefast.quantized.QuantizedConvolution`. The weights of an exit take integers.
    winograd: 0 for direct sums, 1 for F(2, 3) along x, 2 for F(2×2, 3×3); the network says that, not the engine.
    """

    scale: Tensor = field(default_factory=lambda: torch.empty(0))
    ratio: Tensor = field(default_factory=lambda: torch.zeros(()))
    winograd: int = 0

    def algorithm(self, side: int) -> int:
        """Its `winograd`, whatever its section is to have."""
        return self.winograd

    @property
    def parts(self) -> tuple[Tensor, ...]:
        return (*super().parts, self.scale, self.ratio) if self.kind == Kind.CONVOLUTION else super().parts


@dataclass(frozen=True)
class Lowered:
    """A network as layers, in the order in which they run; their source, residual and target are maps, not values.

    maps: (channels, section) of every map, of integers also their zero point; values that are not needed at the same
        time may share one.
    sizes: (H, W) of the maps in every section, for images of the network's input shape.
    image: of a quantised network, [2, C] float32 multiplier and shift of the images; else None.
    """

    layers: tuple[Layer, ...]
    maps: tuple[tuple[int, ...], ...]
    sizes: tuple[tuple[int, int], ...]
    image: Tensor | None = None

    @cached_property
    def weights(self) -> Tensor:
        """All layers' weights in a row, each followed by its bias; float64 holds every integer and float32 number."""
        dtype = torch.float32 if self.image is None else torch.float64
        return torch.cat([part.flatten().to(dtype) for layer in self.layers for part in layer.parts])

    @property
    def nbytes(self) -> int:
        """Of all weights as the kernels read them, but for the rounding up of channels."""
        return self.weights.numel() * (4 if self.image is None else 1)

    @property
    def exit_sections(self) -> tuple[int, ...]:
        """The section of each exit."""
        return tuple(layer.section for layer in self.layers if layer.kind == Kind.EXIT)

    @property
    def geometry(self) -> tuple[Any, ...]:
        """All that the speed depends on, hashable: the layers without their weights."""
        columns = (
            "kind",
            "source",
            "target",
            "residual",
            "activation",
            "kernel",
            "stride",
            "padding",
            "section",
            "groups",
            "row",
        )
        rows = tuple((*(getattr(layer, c) for c in columns), layer.algorithm(0)) for layer in self.layers)
        return rows, tuple(m[:2] for m in self.maps), self.sizes, len(self.layers[-1].bias), self.image is None


@torch.no_grad()
def computed(layer: Layer, maps: Mapping[int, Tensor]) -> Tensor:
    """The map that a layer other than a JOIN or an exit makes of its source and its residual in `maps`."""
    x = maps[layer.source]
    weight, bias = layer.weight.to(x), layer.bias.to(x)
    if layer.kind == Kind.CONVOLUTION:
        y = F.conv2d(x, weight, bias, layer.stride, layer.window[1], groups=layer.groups)
    elif layer.kind == Kind.MAX_POOL:
        kernel, padding = layer.window
        y = F.max_pool2d(x, kernel, layer.stride, padding)
    elif layer.kind == Kind.MEAN:
        y = x.mean((2, 3), keepdim=True)
    elif layer.kind == Kind.SCALE:
        return activated(x * maps[layer.residual], layer.activation)
    else:
        y = x[:, : len(weight)] * weight[:, None, None] + bias[:, None, None]
    y = y + maps[layer.residual] if layer.residual >= 0 else y
    return activated(y, layer.activation)


@torch.no_grad()
def answers(lowered: Lowered, images: Tensor) -> list[Tensor]:
    """[N, K + 1] logits and confidence row of every exit for images [N, C, H, W] on the CPU, layer by layer in PyTorch.

    To check the layers by something that shares no code with the kernels.
    """
    maps, exits = {0: images}, dict[int, Tensor]()
    for layer in lowered.layers:
        if layer.kind == Kind.EXIT:
            x, weight, bias = maps[layer.source], layer.weight.to(images), layer.bias.to(images)
            pooled = x.flatten(1) if weight.dim() == 4 else x.mean((2, 3))
            exits[layer.target] = F.linear(pooled, weight.flatten(1), bias)
            continue
        if layer.kind == Kind.JOIN:
            channels = lowered.maps[layer.target][0]
            maps[layer.target] = joined(maps[layer.source], maps.get(layer.target), layer.channel, channels)
        else:
            maps[layer.target] = computed(layer, maps)
    return [exits[i] for i in sorted(exits)]
