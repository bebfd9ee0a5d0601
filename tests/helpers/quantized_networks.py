"""Random quantised networks, built step by step, with maps that use most of 0 … 255."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from networks import lived_in
from torch import Tensor

import eefast
from eefast.heads import ExitHead
from eefast.modules import integer_maps
from eefast.quantized import QuantizedAffine, QuantizedConvolution, QuantizedMaxPool, QuantizedStage

NORMALIZATION = (0.4, 0.5, 0.45), (0.25, 0.2, 0.3)


class Steps:
    """The steps of one stage as they are added; every method returns the number of the new value.

    channels: of the stage's input; scale, zero: of that, or image: multiplier and shift of images.
    """

    def __init__(
        self, r: torch.Generator, channels: int, scale: float = 1.0, zero: int = 0, image: Tensor | None = None
    ) -> None:
        self.r, self.steps, self.image = r, list[QuantizedConvolution | QuantizedAffine | QuantizedMaxPool](), image
        self.channels, self.scales, self.zeros = [channels], [scale], [zero]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.r)

    def convolution(
        self, outputs: int, kernel: int = 3, stride: int = 1, padding: int | None = None, relu: bool = True,
        source: int = -1, residual: int = -1, winograd: int = 0, scale: float = 1.0,
    ) -> int:  # fmt: skip
        """scale: factor on the scale of the sums, by which they are made small or large."""
        source = len(self.steps) if source < 0 else source
        inputs, sides = self.channels[source], [(kernel, kernel), (3, 4), (4, 4)][winograd]
        weight = torch.randint(-127, 128, (outputs, inputs, *sides), generator=self.r, dtype=torch.int8)
        spread = 6000 * (inputs * kernel**2) ** 0.5
        scales = scale * 50 / spread * self.uniform(outputs, low=0.5, high=1.5)
        zero = 0 if relu else int(torch.randint(60, 180, (), generator=self.r))
        bias = ((zero + 40 * torch.randn(outputs, generator=self.r)) * scale / scales).round()
        # Of an image or a map with another zero point than 0, what that adds.
        middle = 100 if source == 0 and self.image is not None else self.zeros[source]
        bias = (bias - middle * weight.sum((1, 2, 3)) * (not winograd)).expand(max(2, 2 * winograd), -1).clone()
        if winograd:  # halves of equal parity
            bias += 2 * torch.randint(-500, 500, bias.shape, generator=self.r)
        if winograd == 2:
            bias[[1, 3]] += 1
        ratio = integer_maps.short_mantissa(self.uniform(1, low=0.4, high=1.1))[0] if residual >= 0 else 0.0
        padding = kernel // 2 if padding is None else padding
        self.steps.append(QuantizedConvolution(
            source, weight, bias, scales, kernel=kernel, stride=stride, padding=padding, relu=relu, residual=residual,
            ratio=ratio, winograd=winograd,
        ))  # fmt: skip
        return self._value(outputs, float(self.uniform(1, low=0.01, high=0.03)), zero)

    def affine(self, relu: bool = True, source: int = -1) -> int:
        """Keeps the zero point without a ReLU."""
        source = len(self.steps) if source < 0 else source
        channels, zero = self.channels[source], self.zeros[source]
        scale = integer_maps.short_mantissa(self.uniform(channels, low=0.6, high=1.6))
        after = 0 if relu else zero
        shift = after - zero * scale + 20 * torch.randn(channels, generator=self.r)
        self.steps.append(QuantizedAffine(source, scale, shift, relu=relu))
        return self._value(channels, 0.02, after)

    def max_pool(self, kernel: int = 3, stride: int = 2, padding: int = 1) -> int:
        source = len(self.steps)
        self.steps.append(QuantizedMaxPool(source, kernel, stride, padding))
        return self._value(self.channels[source], self.scales[source], self.zeros[source])

    def basic(self, outputs: int, stride: int = 1, winograd: int = 0) -> int:
        """A basic block: two convolutions and a shortcut, which is a projection where the map changes."""
        before = len(self.steps)
        shortcut = before
        if stride != 1 or outputs != self.channels[before]:
            shortcut = self.convolution(outputs, 1, stride, relu=False, source=before)
        fast = winograd if stride == 1 and before > 0 else 0
        middle = self.convolution(outputs, 3, stride, source=before, winograd=fast)
        return self.convolution(outputs, source=middle, residual=shortcut, winograd=winograd)

    def pre_activation(self, outputs: int, stride: int = 1, winograd: int = 1) -> int:
        """A pre-activation block: the residual stream keeps its signs."""
        before = len(self.steps)
        active = self.affine()
        shortcut = before
        if stride != 1 or outputs != self.channels[before]:
            shortcut = self.convolution(outputs, 1, stride, relu=False, source=active)
        middle = self.convolution(outputs, 3, stride, source=active)
        return self.convolution(outputs, relu=False, source=middle, residual=shortcut, winograd=winograd)

    def _value(self, channels: int, scale: float, zero: int) -> int:
        self.channels.append(channels)
        self.scales.append(scale)
        self.zeros.append(zero)
        return len(self.steps)

    def stage(self) -> QuantizedStage:
        return QuantizedStage(self.steps, self.scales, self.zeros, output=len(self.steps), image=self.image)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Of the map of every value."""
        found = [(height, width)]
        for step in self.steps:
            k, s, p = (1, 1, 0) if isinstance(step, QuantizedAffine) else (step.kernel, step.stride, step.padding)
            found.append(tuple((side + 2 * p - k) // s + 1 for side in found[step.source]))  # type: ignore[arg-type]
        return found

    def next(self) -> Steps:
        """The steps of what reads the last value."""
        return Steps(self.r, self.channels[-1], self.scales[-1], self.zeros[-1])


def image_constants(channels: int, normalization: tuple[tuple[float, ...], ...] | None) -> Tensor:
    if normalization is None:
        return torch.tensor([[40.0], [101.0]]).expand(2, channels)
    mean, std = torch.tensor(normalization)
    return torch.stack([255 * std, 255 * mean])


@torch.no_grad()
def network(
    seed: int = 0, shape: tuple[int, int, int] = (3, 13, 11), head: str = "pool", blocks: str = "basic",
    width: int = 16, winograd: Sequence[int] = (1, 2), classes: int = 7, exits: int = 2, criterion: str = "learned",
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> eefast.EarlyExitNet:  # fmt: skip
    """A quantised network of `exits` early exits: stem, then a block per stage, the first of `width` channels.

    blocks: "basic", "pre-activation" or "pool", which are basic ones after a max pooling.
    winograd: how the first stage's convolutions are computed, the second's and so on, then those of the first again.
    """
    r = torch.Generator().manual_seed(seed)
    steps = Steps(r, shape[0], image=image_constants(shape[0], normalization))
    steps.convolution(width, relu=blocks != "pre-activation")
    if blocks == "pool":
        steps.max_pool()
    stages, heads, kind = [], [], head
    features, here = torch.zeros(1, *shape), None
    for i in range(exits + 1):
        outputs, stride = width + 3 * i, 2 if i % 2 and head != "plain" else 1
        if blocks == "pre-activation":
            steps.pre_activation(outputs, stride, winograd[i % len(winograd)])
        else:
            steps.basic(outputs, stride, winograd[i % len(winograd)])
        stages.append(steps.stage())
        features = stages[-1](features)
        here = ExitHead(kind, tuple(features.shape[1:]), classes, shape)
        if len(here.convs):
            convs = steps.next()
            for _ in range(len(here.convs)):
                convs.convolution(outputs, winograd=0 if convs.zeros[-1] else winograd[i % len(winograd)])
            here.convs = torch.nn.Sequential(convs.stage())
        heads.append(here)
        steps = steps.next()
    net = eefast.EarlyExitNet(stages, heads, input_shape=shape, normalization=normalization, criterion=criterion)
    lived_in(net, seed)
    return net
