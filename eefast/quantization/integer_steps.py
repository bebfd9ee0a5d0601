"""Float layers, scales and zero points → the steps of quantised stages: integer weights, biases, scales."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..modules.integer_maps import largest_sums, short_mantissa, winograd_weight
from ..ops import Activation, Kind
from ..planning.layers import Layer
from ..quantized import QuantizedAffine, QuantizedConvolution, QuantizedMaxPool, QuantizedStage, Step
from .float_layers import FloatStage
from .observers import PerChannelMinMaxObserver
from .ranges import Ranges

LARGEST_WEIGHT = 127
LARGEST_BIAS = 2**22 - 1
"""Of the bias of the layer alone, without offsets of its inputs: keeps all sums far from the ends of int32."""
SMALLEST_SCALE = 2.0**-60
OFFSET = 127.5
"""What exact transformed inputs are above what they stand for, but for the means of frequency 1."""


def can_use_winograd(stage: FloatStage, ranges: Ranges, layer: Layer) -> bool:
    """Whether Winograd can compute such layers: 3 × 3, stride 1, padding 1, zero point 0, not of the image."""
    plain = (layer.kind, layer.kernel, layer.stride, layer.padding) == (Kind.CONVOLUTION, 3, 1, 1)
    return plain and not layer.row and ranges.zeros[layer.source] == 0 and not (stage.image and layer.source == 0)


def quantized_stage(stage: FloatStage, ranges: Ranges, image: Tensor, winograd: Mapping[int, Tensor]) -> QuantizedStage:
    """The module that computes a stage in integers.

    image: [2, C], multiplier and shift of images.
    winograd: the layers that Winograd's convolutions compute, by index, with the mean excess of the transformed inputs:
        [C, 4] for F(2, 3) along x, [C, 4, 4] for F(2×2, 3×3).
    Raises `ValueError` for layers whose numbers cannot be held.
    """
    steps: list[Step] = []
    read_image = image if stage.image else None
    for i, layer in enumerate(stage.layers):
        try:
            if layer.kind == Kind.CONVOLUTION:
                steps.append(_convolution(layer, ranges, read_image, winograd.get(i)))
            elif layer.kind == Kind.MAX_POOL:
                steps.append(QuantizedMaxPool(layer.source, layer.kernel, layer.stride, layer.padding, layer.row))
            else:
                steps.append(_affine(layer, ranges))
        except OverflowError as error:
            raise ValueError(f"layer {i} of {stage.path} cannot be quantised: {error}") from error
    return QuantizedStage(steps, ranges.scales, ranges.zeros, output=stage.output, image=read_image)


def _convolution(layer: Layer, ranges: Ranges, image: Tensor | None, excess: Tensor | None) -> QuantizedConvolution:
    weight, bias = layer.weight.double(), layer.bias.double()
    scale_in, scale_out = ranges.scales[layer.source], ranges.scales[layer.target]
    zero_in = torch.full((weight.shape[1],), float(ranges.zeros[layer.source]), dtype=torch.float64)
    if image is not None and layer.source == 0:
        multiplier, zero_in = image.double()
        weight, scale_in = weight / multiplier[:, None, None], 1.0
    ratio = torch.zeros(())
    offset = bias / scale_out + ranges.zeros[layer.target]
    if layer.residual >= 0:
        ratio = short_mantissa(torch.tensor(ranges.scales[layer.residual] / scale_out, dtype=torch.float32))
        offset = offset - ratio.double() * ranges.zeros[layer.residual]
    winograd = 0 if excess is None else excess.dim() - 1
    step_in = 2**winograd * scale_in
    if winograd:
        weight = winograd_weight(weight, winograd)
    scale_w = _weight_scale(weight, offset * (scale_out / step_in), scale_out / step_in)
    integers = (weight / scale_w[:, None, None, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
    scale = (step_in * scale_w / scale_out).float()
    if not scale.isfinite().all():
        raise OverflowError("its weights are too large for the ranges of its maps")
    start = offset / scale.double()
    if excess is None:
        biases = (start - (integers.sum((2, 3)) * zero_in).sum(1)).round().expand(2, -1)
    else:
        biases = _winograd_biases(start, integers, excess)
    if not (largest_sums(integers, biases, winograd) < 2**31).all():
        raise OverflowError(f"sums over {weight.shape[1]} channels do not fit 32 bits")
    return QuantizedConvolution(
        layer.source, integers, biases, scale, kernel=layer.kernel, stride=layer.stride, padding=layer.padding,
        relu=layer.activation == Activation.RELU, residual=layer.residual, ratio=ratio, winograd=winograd,
        row=layer.row,
    )  # fmt: skip


def _winograd_biases(start: Tensor, weight: Tensor, excess: Tensor) -> Tensor:
    """[2, O] or [4, O] float64: `start` [O] without what the transformed inputs are too large by; see `winograd_sums`.

    Rows that engines add and subtract are both even or both odd, so that their sum and difference can be halved.
    """
    offsets = torch.full(excess.shape[1:], OFFSET, dtype=torch.float64)
    offsets[(1,) * offsets.dim()] = 0
    if excess.dim() == 2:
        above = _sides((weight.sum(2) * (offsets + excess)).sum(1), 1)
    else:  # [O, 2 (rows), 2 (columns)] → [O, 4]
        above = _sides(_sides((weight * (offsets + excess)).sum(1), 1), 2).flatten(1)
    first, second = (start - above.t()).chunk(2)
    first = first.round()
    return torch.cat([first, first + 2 * ((second - first) / 2).round()])


def _sides(products: Tensor, dim: int) -> Tensor:
    """Of the four frequencies along a dimension the sums for the even and the odd output."""
    m0, m1, m2, m3 = products.unbind(dim)
    return torch.stack([m0 + m1 - m2, m1 + m2 + m3], dim)


def _weight_scale(weight: Tensor, start: Tensor, out_over_in: float) -> Tensor:
    """[O] float64 scale of the weights, so that neither these nor the bias is too large.

    start: [O] what the bias would be with a scale of 1.
    """
    observer = PerChannelMinMaxObserver()
    observer.observe(weight)
    smallest = torch.maximum(observer.max_val / LARGEST_WEIGHT, start.abs() / LARGEST_BIAS)
    return smallest.clamp_min(SMALLEST_SCALE * out_over_in)


def _affine(layer: Layer, ranges: Ranges) -> QuantizedAffine:
    scale_in, scale_out = ranges.scales[layer.source], ranges.scales[layer.target]
    scale = short_mantissa(layer.weight.double() * (scale_in / scale_out))
    shift = layer.bias.double() / scale_out + ranges.zeros[layer.target] - scale.double() * ranges.zeros[layer.source]
    if not (scale.isfinite() & shift.isfinite()).all():
        raise OverflowError("its scale is too large for the ranges of its maps")
    return QuantizedAffine(layer.source, scale, shift.float(), relu=layer.activation == Activation.RELU)
