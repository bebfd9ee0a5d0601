"""Weights → vectors in the order in which the resident kernels read them, the bias first."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 16
"""Number of channels of one pixel that are stored side by side."""

# Lavin & Gray 2015: the filter's part of F(m×m, 3×3).
_FILTER = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        *((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6)),
        *((1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
    ),
}


def convolution(weight: Tensor, bias: Tensor, winograd: int, planes: bool, bfloat16: bool) -> Tensor:
    """One float32 vector for a convolution of weight [O, C, k, k] and bias [O].

    winograd: 0, or the side of the output tiles, 2 or 4.
    planes: whether the input is an image, which is stored channel by channel, instead of in blocks.
    bfloat16: pairs of bfloat16 weights in place of one float32; images stay float32.
    """
    outputs = _padded(len(weight))
    bias, weight = _filled(bias, outputs), _filled(weight, outputs)
    if winograd:
        return torch.cat([bias, _winograd(weight, winograd)])
    width = 32 if outputs // BLOCK % 2 == 0 else 16
    # [groups, C, k, k, width]
    grouped = weight.unflatten(0, (-1, width)).permute(0, 2, 3, 4, 1)
    parts = []
    for group in grouped:
        for block in group.split(1 if planes else BLOCK):
            rows = block.permute(1, 2, 0, 3)  # [k, k, C of the block, width]
            parts.append(_pairs(rows) if bfloat16 and not planes else rows.flatten())
    return torch.cat([bias, *parts])


def grouped(weight: Tensor, bias: Tensor, inputs: int, groups: int, bfloat16: bool) -> Tensor:
    """One float32 vector for a convolution of `inputs` channels in groups, of weight [O, inputs / groups, k, k].

    Of one channel each: [O / 16][k, k][16]; of 2, 4 or 8 inputs and outputs: [O / 16][k, k][input][16]; both float32
    always. Else every unit of 16 outputs, or of 32 where groups are multiples of that, as a convolution of its own: of
    the blocks of inputs that its groups read, the others' weights 0.
    """
    outputs, per_group = _padded(len(weight)), len(weight) // groups
    if groups == inputs == len(weight):
        blocks = _filled(weight, outputs).unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 4, 1)
        return torch.cat([_filled(bias, outputs), blocks.flatten()])
    if weight.shape[1] == per_group in (2, 4, 8):
        blocks = _filled(weight, outputs).unflatten(0, (-1, BLOCK)).permute(0, 3, 4, 2, 1)
        return torch.cat([_filled(bias, outputs), blocks.flatten()])
    width = grouped_width(outputs // BLOCK, per_group)
    weight, depth = _filled(weight, outputs), weight.shape[1]
    packed = []
    for first in range(0, outputs, width):
        begin, end = grouped_inputs(first, min(first + width, groups * per_group), per_group, depth)
        unit = weight.new_zeros(width, end - begin, *weight.shape[2:])
        for o in range(first, min(first + width, groups * per_group)):
            at = o // per_group * depth - begin
            unit[o - first, at : at + depth] = weight[o]
        packed.append(convolution(unit, unit.new_zeros(width), 0, False, bfloat16)[width:])
    return torch.cat([_filled(bias, outputs), *packed])


def grouped_width(blocks: int, per_group: int) -> int:
    """Outputs of a unit."""
    return 32 if blocks % 2 == 0 and per_group % 32 == 0 else 16


def grouped_inputs(first: int, end: int, per_group: int, depth: int) -> tuple[int, int]:
    """The input channels from the begin of a block on that the outputs [first, end) read."""
    return first // per_group * depth // BLOCK * BLOCK, ((end - 1) // per_group + 1) * depth


def _winograd(weight: Tensor, side: int) -> Tensor:
    """[frequency][group][C][width], transformed in float64; of windows of one row [O / 16][C][frequency][16]."""
    if weight.shape[2] == 1:
        lines = torch.einsum("bj,ocj->ocb", torch.tensor(_FILTER[side], dtype=torch.float64), weight[:, :, 0].double())
        return lines.float().unflatten(0, (-1, BLOCK)).permute(0, 2, 3, 1).flatten()
    width = next(w for w in (64, 32, 16) if len(weight) % w == 0)
    transform = torch.tensor(_FILTER[side], dtype=torch.float64)
    transformed = weight.new_empty(side + 2, side + 2, len(weight) // width, weight.shape[1], width)
    # Group by group, since all of a large layer in float64 would not fit the cache.
    for group, part in enumerate(weight.split(width)):
        transformed[:, :, group] = torch.einsum("ai,ocij,bj->abco", transform, part.double(), transform)
    return transformed.flatten()


def _pairs(rows: Tensor) -> Tensor:
    """[k, k, C, width] → [k, k, C / 2, width, 2] in bfloat16, two in the place of one float32."""
    rows = torch.nn.functional.pad(rows, (0, 0, 0, rows.shape[2] % 2)).unflatten(2, (-1, 2)).transpose(3, 4)
    return rows.bfloat16().contiguous().view(torch.float32).flatten()


_FREQUENCIES = [1, 2, 0, 3]
"""In the order in which the INT8 kernels compute them."""


def int8_convolution(weight: Tensor, bias: Tensor, scale: Tensor, ratio: Tensor, winograd: int) -> Tensor:
    """One vector of float32 places for a convolution of the INT8 kernels, [4 inputs] of a vector's outputs at a time.

    winograd: 0 direct, 1 for F(2, 3) along x, 2 for F(2×2, 3×3).
    weight, bias, scale, ratio: as `eefast.quantized.QuantizedConvolution` holds them.
    int32 starts of the sums: direct bias and 0; F(2, 3) half the sum of both biases and half their difference; F(2×2)
    these two of even and odd rows, in even columns, then in odd columns. Scale; ratio.
    Weights int8, direct [group][ky][C / 4][kx][vector][16 outputs][4 inputs];
    F(2, 3) [group][frequencies 1, 2, then 0, 3][C / 4][frequency][ky][vector][16][4];
    F(2×2) [group][frequency along x: 1, 2, 0, 3][along y: 1, 2, 0, 3][C / 4][vector][16][4].
    """
    outputs, biases = _padded(len(weight)), bias.long()
    if winograd == 0:
        starts = [biases[0], torch.zeros_like(biases[0])]
    else:  # pairs of even and odd columns, or of even and odd rows
        pairs = [biases] if winograd == 1 else [biases[::2], biases[1::2]]
        starts = [half for even, odd in pairs for half in ((even + odd) // 2, (odd - even) // 2)]
    head = [_filled(part.int(), outputs).view(torch.float32) for part in starts]
    ratio = _filled(ratio.view(1), BLOCK)
    width = 32 if outputs // BLOCK % 2 == 0 else 16
    filled = _filled(_filled(weight, outputs).transpose(0, 1), -(-weight.shape[1] // 4) * 4)
    # [C / 4, 4, group, vector, 16, ky, kx]
    tiles = filled.unflatten(1, (-1, width // BLOCK, BLOCK)).unflatten(0, (-1, 4))
    if winograd == 0:
        ordered = tiles.permute(2, 5, 0, 6, 3, 4, 1)
    elif winograd == 1:
        phases = tiles[..., _FREQUENCIES].unflatten(6, (2, 2))
        ordered = phases.permute(2, 6, 0, 7, 5, 3, 4, 1)
    else:
        ordered = tiles[..., _FREQUENCIES][..., _FREQUENCIES, :].permute(2, 6, 5, 0, 3, 4, 1)
    return torch.cat([*head, _filled(scale, outputs), ratio, ordered.flatten().view(torch.float32)])


def fragments(weight: Tensor, bias: Tensor, image: bool, dtype: torch.dtype) -> Tensor:
    """One float32 vector for a convolution of the CUDA kernel: bias, then [C/16][tap][O/16][lane][8] in 16 bits.

    A lane's eight numbers are its part of mma.m16n8k16's B for outputs n and n + 8: inputs k, k + 1, k + 8, k + 9.
    image: of at most 8 channels, of which two taps fill a depth of 16; the tenth tap is zero.
    """
    outputs = _padded(len(weight))
    bias, weight = _filled(bias, outputs), _filled(weight, outputs).flatten(2)  # [O, C, taps]
    if image:
        taps = torch.nn.functional.pad(weight.transpose(1, 2), (0, 8 - weight.shape[1], 0, 1))  # [O, 10, 8]
        weight = taps.reshape(outputs, 80, 1)
    weight = _filled(weight.transpose(0, 1), _padded(weight.shape[1]))  # [C, O, taps]
    tiles = weight.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).permute(0, 4, 2, 1, 3)  # [C/16, tap, O/16, k, n]
    lane = torch.arange(32)
    k, n = lane % 4 * 2, lane // 4
    parts = torch.stack([tiles[..., k + dk, n + dn] for dn in (0, 8) for dk in (0, 1, 8, 9)], dim=-1)
    return torch.cat([bias, parts.to(dtype).contiguous().view(torch.float32).flatten()])


def class_rows(weight: Tensor, bias: Tensor) -> Tensor:
    """One float32 vector for an exit of the CUDA kernel: bias, then [K + 1][C]."""
    rows = _filled(weight.t(), _padded(weight.shape[1])).t()
    return torch.cat([_filled(bias, _padded(len(bias))), rows.flatten()])


def affine(scale: Tensor, shift: Tensor) -> Tensor:
    """One vector for scale and shift [C]."""
    channels = _padded(len(scale))
    return torch.cat([_filled(shift, channels), _filled(scale, channels)])


def exit_rows(weight: Tensor, bias: Tensor) -> Tensor:
    """One vector for an exit's linear: for every 16 rows their weights of every feature side by side.

    weight: [K + 1, C] or, where the map is flattened, [K + 1, C, H, W]; bias: [K + 1].
    """
    rows, channels = _padded(len(bias)), weight.shape[1]
    weight = weight.view(len(bias), channels, *(weight.shape[2:] or (1, 1)))
    features = _filled(weight.transpose(0, 1), _padded(channels))
    # [blocks, H, W, 16, K + 1]
    ordered = features.unflatten(0, (-1, BLOCK)).permute(0, 3, 4, 1, 2).flatten(0, 3)
    blocks = _filled(ordered.t(), rows).unflatten(0, (-1, BLOCK))  # [rows / 16, 16, features]
    return torch.cat([_filled(bias, rows), blocks.transpose(1, 2).flatten()])


def _padded(n: int) -> int:
    return -(-n // BLOCK) * BLOCK


def _filled(tensor: Tensor, n: int) -> Tensor:
    """Filled up with zeros to n entries."""
    return torch.cat([tensor, tensor.new_zeros(n - len(tensor), *tensor.shape[1:])])
