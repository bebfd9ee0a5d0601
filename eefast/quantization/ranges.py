"""Layers and calibration images → the scale and the zero point of every value, and how images become integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..modules.integer_maps import LARGEST
from ..ops import Activation, Kind
from .float_layers import FloatStage
from .observers import MinMaxObserver, PercentileObserver


@dataclass(frozen=True)
class Ranges:
    """Scale and zero point of every value of a stage: a map's integer q stands for (q - zero) · scale."""

    scales: list[float]
    zeros: list[int]


@torch.no_grad()
def observe(
    net: EarlyExitNet, stages: Sequence[FloatStage], batches: Sequence[Tensor], percentile: float
) -> tuple[list[Ranges], Tensor]:
    """Ranges of every stage's values on images, and float32 [2, C], multiplier and shift of images.

    batches: images [n, C, H, W] float32 on the CPU, as `net.prepare` returns them.
    percentile: which share of a map's values the largest integer covers, in percent.
    """
    image, images = MinMaxObserver(), sum(map(len, batches))
    observers = [[PercentileObserver(percentile, images) for _ in stage.layers] for stage in stages]
    for x in batches:
        image.observe(x)
        for stage, found in zip(stages, observers, strict=True):
            values = stage.values(x)
            for layer, observer in zip(stage.layers, found, strict=True):
                if layer.kind != Kind.MAX_POOL:  # its values are those of its source
                    observer.observe(values[layer.target])
            x = x if stage.head else values[stage.output]
    ranges, last = list[Ranges](), (1.0, 0)
    for stage, found in zip(stages, observers, strict=True):
        ranges.append(_ranges(stage, last, found))
        if not stage.head:
            last = ranges[-1].scales[stage.output], ranges[-1].zeros[stage.output]
    return ranges, _image_parameters(net, image)


def _ranges(stage: FloatStage, source: tuple[float, int], observers: list[PercentileObserver]) -> Ranges:
    scales, zeros = [source[0]], [source[1]]
    for layer, observer in zip(stage.layers, observers, strict=True):
        if layer.kind == Kind.MAX_POOL:
            scale, zero = scales[layer.source], zeros[layer.source]
        else:
            scale, zero = scale_and_zero(observer, layer.activation == Activation.RELU)
        scales.append(scale)
        zeros.append(zero)
    return Ranges(scales, zeros)


def scale_and_zero(observer: PercentileObserver, relu: bool) -> tuple[float, int]:
    """Of a map whose values were observed; the zero point is 0 after a ReLU."""
    low, high = observer.bounds()
    if max(-low, high) <= 0:  # nearly all values are 0
        low, high = observer.min_val, observer.max_val
    low, high = 0.0 if relu else min(low, 0.0), max(high, 0.0)
    scale = (high - low) / LARGEST
    if scale < torch.finfo(torch.float32).tiny:
        return 1.0 / LARGEST, 0
    return scale, round(-low / scale)


def _image_parameters(net: EarlyExitNet, observer: MinMaxObserver) -> Tensor:
    """[2, C] float32, multiplier and shift: integers are the pixels where the network has a normalization."""
    channels = net.input_shape[0]
    if net.normalization is not None:
        mean, std = (torch.tensor(part, dtype=torch.float64) for part in net.normalization)
        return (LARGEST * torch.stack([std, mean])).float()
    low, high = min(observer.min_val, 0.0), max(observer.max_val, 0.0)  # pixels outside of the image are 0
    multiplier = LARGEST / (high - low)
    return torch.tensor([[multiplier] * channels, [round(-low * multiplier)] * channels], dtype=torch.float32)
