"""Maps of integers 0 … 255 → maps of integers: the arithmetic of quantised networks, exact in plain PyTorch.

Maps are float32 tensors [N, C, H, W] that hold integers, so that an image with a NaN stays one of NaNs throughout.
Sums of products are exact, whatever their order: in float32 where they stay below 2^24, else in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 255
"""The largest integer in a map."""

EXACT = 2**24
"""Up to here float32 holds every integer."""


def to_integers(values: Tensor) -> Tensor:
    """Rounded half to even, and limited to 0 … 255; NaN stays NaN."""
    return values.round().clamp(0, LARGEST)


def image_integers(images: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """Images [N, C, H, W] of any float dtype → integers, x · multiplier[c] + shift[c] in float32.

    Every integer of an image that has a NaN anywhere is NaN.
    """
    integers = to_integers(images.float() * multiplier[:, None, None] + shift[:, None, None])
    broken = images.isnan().flatten(1).any(1)
    return integers.masked_fill(broken[:, None, None, None], torch.nan)


def image_fill(shift: Tensor) -> Tensor:
    """[C] integers of the pixels outside of an image."""
    return to_integers(shift)


def padded(integers: Tensor, padding: int | tuple[int, int], fill: Tensor | int) -> Tensor:
    """With `padding` (rows, columns) of pixels of the value `fill`, a number or one per channel [C], at every side."""
    rows, columns = padding if isinstance(padding, tuple) else (padding, padding)
    around = columns, columns, rows, rows
    if isinstance(fill, Tensor):
        fill = fill[:, None, None]
        return F.pad(integers - fill, around) + fill
    return F.pad(integers, around, value=fill)


def convolution_sums(
    integers: Tensor, weight: Tensor, bias: Tensor, stride: int = 1, padding: int | tuple[int, int] = 0,
    fill: Tensor | int = 0,
) -> Tensor:  # fmt: skip
    """bias[o] + Σ weight[o, c, i, j] · integer [N, O, H', W'], float32 or, where that is not exact, float64.

    weight: integers -127 … 127 [O, C, rows, columns]; bias: integers [O]; padding, fill: see `padded`.
    """
    dtype = _exact_dtype(weight.abs().double().sum((1, 2, 3)), bias)
    return _products(padded(integers, padding, fill), weight, stride, dtype) + bias.to(dtype)[:, None, None]


def winograd_inputs(integers: Tensor, winograd: int) -> Tensor:
    """The transformed inputs of Winograd's convolutions, integers 0 … 255.

    winograd 1, F(2, 3) along x: [4, N, C, H + 2, tiles]; tile t makes the output columns 2 t and 2 t + 1 of the source
    columns 2 t - 1 … 2 t + 2. winograd 2, F(2×2, 3×3): [4 (along y), 4 (along x), N, C, tiles, tiles], from those of
    1, by the same formulas over their rows.
    Every one is the mean of two bytes, rounded up where it is half of an odd number: what the instruction `vpavgb`
    computes.
    """
    return _inputs(integers, winograd, rounded=True)


def exact_winograd_inputs(integers: Tensor, winograd: int) -> Tensor:
    """`winograd_inputs` without any rounding, to measure what that adds."""
    return _inputs(integers, winograd, rounded=False)


def _inputs(integers: Tensor, winograd: int, rounded: bool) -> Tensor:
    height, width = integers.shape[2:]
    rows = 1 + (height % 2 if winograd == 2 else 0)
    values = _means(F.pad(integers, (1, 1 + width % 2, 1, rows)), -1, rounded)
    return _means(values, -2, rounded) if winograd == 2 else values


def _means(d: Tensor, dim: int, rounded: bool) -> Tensor:
    """[4, *shape], of four neighbours at a time along a dimension -1 or -2, every two apart."""
    d0, d1, d2, d3 = d.unfold(dim, 4, 2).unbind(-1)
    means = torch.stack([d0 - d2, d1 + d2, d1 - d2, d1 - d3])
    for differences in (means[0], means[2:]):
        differences += LARGEST
    means /= 2
    return means.add_(0.5).floor_() if rounded else means


def winograd_weight(weight: Tensor, winograd: int) -> Tensor:
    """[O, C, 3, 3] → what the transformed inputs are multiplied with, of the same dtype.

    winograd 1: [O, C, 3 (rows), 4 (frequencies)]; 2: [O, C, 4 (along y), 4 (along x)].
    """
    weight = _filtered(weight, 3)
    return _filtered(weight, 2) if winograd == 2 else weight


def _filtered(weight: Tensor, dim: int) -> Tensor:
    g0, g1, g2 = weight.unbind(dim)
    return torch.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, -g2], dim)


def winograd_sums(integers: Tensor, weight: Tensor, bias: Tensor, winograd: int) -> Tensor:
    """Sums of a 3 × 3 convolution of stride 1, padding 1 and zero point 0 [N, O, H, W], by Winograd's convolutions.

    float32 or, where that is not exact, float64.
    weight: integers, see `winograd_weight`; bias: integers, for winograd 1 [2, O] of even and of odd columns, for 2
    [4, O] of those two in even rows, then in odd rows.
    """
    height, width = integers.shape[2:]
    inputs = winograd_inputs(integers, winograd)
    dtype = _exact_dtype(weight.abs().double().sum((1, 2, 3)), bias)
    if winograd == 2:
        of_rows = [_combined([_products(v, weight[:, :, a, b, None, None], 1, dtype) for a, v in enumerate(column)], 3)
                   for b, column in enumerate(inputs.unbind(1))]  # fmt: skip
    else:
        of_rows = [_products(v, weight[..., b, None], 1, dtype) for b, v in enumerate(inputs)]
    sums = _combined(of_rows, 4)[:, :, :height, :width]
    every = len(bias) // 2
    for k, row in enumerate(bias.to(dtype)):
        sums[:, :, k // 2 :: every, k % 2 :: 2] += row[:, None, None]
    return sums


def _combined(products: Sequence[Tensor], dim: int) -> Tensor:
    """Four products per tile [N, O, rows, columns] → two sums side by side, in the dimension before `dim`."""
    m0, m1, m2, m3 = products
    return torch.stack([m0 + m1 - m2, m1 + m2 + m3], dim).flatten(dim - 1, dim)


def largest_sums(weight: Tensor, bias: Tensor, winograd: int) -> Tensor:
    """[O] float64: what no sum of a convolution exceeds in magnitude, whatever the map; see the sums of either kind."""
    magnitudes = weight.double().abs()
    if winograd == 1:
        of_frequency = magnitudes.sum((1, 2))  # [O, 4]
        magnitude = torch.stack([of_frequency[:, :3].sum(1), of_frequency[:, 1:].sum(1)])
    else:
        magnitude = magnitudes.sum((1, 2, 3))
    return (bias.double().abs() + LARGEST * magnitude).amax(0)


def requantized(sums: Tensor, scale: Tensor, residual: Tensor | None = None, ratio: Tensor | float = 0.0) -> Tensor:
    """Sums → integers: f32(sum) · scale[o], plus residual · ratio where there is one, each step rounded to float32."""
    scaled = sums.float() * scale.float()[:, None, None]
    return to_integers(scaled if residual is None else scaled + residual * ratio)


def affine(integers: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Every integer · scale[c] + shift[c], rounded and limited to 0 … 255."""
    return to_integers(integers * scale.float()[:, None, None] + shift.float()[:, None, None])


def max_pool(integers: Tensor, kernel: int | tuple[int, int], stride: int, padding: int | tuple[int, int]) -> Tensor:
    """The largest integer of every window, of those inside the map."""
    return F.max_pool2d(integers, kernel, stride, padding)


def short_mantissa(value: Tensor) -> Tensor:
    """float32 numbers of at most 16 significant bits, whose products with integers up to 255 are exact."""
    fraction, exponent = torch.frexp(value.double())
    return torch.ldexp((fraction * 2**16).round(), exponent - 16).float()


def _exact_dtype(magnitudes: Tensor, bias: Tensor) -> torch.dtype:
    """float32 if that holds all sums exactly; magnitudes: [O], Σ |weight|; bias: [O] or [rows, O]."""
    largest = magnitudes * LARGEST + bias.double().abs()
    return torch.float32 if bool((largest < EXACT).all()) else torch.float64


def _products(integers: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
    """Exact sums of products without padding, in `dtype`, which holds them."""
    bounds = (weight.double().abs().sum((2, 3)) * LARGEST).cumsum(1)  # [O, C]
    parts = _channel_parts(bounds)
    if integers.is_cuda or not parts or not _sums_directly():
        # Other algorithms than sums of products, such as Winograd's, are exact after rounding in float64.
        return F.conv2d(integers.double(), weight.double(), stride=stride).round().to(dtype)
    sums = [F.conv2d(integers[:, part], weight[:, part].float(), stride=stride).to(dtype) for part in parts]
    return torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]


def _sums_directly() -> bool:
    """Whether `F.conv2d` multiplies and adds float32 on the CPU, instead of transforming them."""
    return torch.backends.mkldnn.is_available() and torch._C._get_mkldnn_enabled()


def _channel_parts(bounds: Tensor) -> list[slice]:
    """As many input channels at a time as keep every sum exact in float32; none if one channel alone does not.

    bounds: [O, C], the largest sum of products of the channels so far.
    """
    parts, start, channels = [], 0, bounds.shape[1]
    while start < channels:
        before = bounds[:, start - 1 : start] if start else 0
        fits = int((bounds[:, start:] - before < EXACT).all(0).cumprod(0).sum())
        if not fits:
            return []
        parts.append(slice(start, start + fits))
        start += fits
    return parts
