"""Quantised maps in NumPy's 64-bit integers and single float32 operations: the independent answer of the arithmetic."""

import numpy as np
import torch

from eefast.quantized import QuantizedAffine, QuantizedConvolution, QuantizedStage


def products(q, weight, stride, padding, fill):
    """Σ weight · q in int64, [N, O, H', W']; fill: of pixels outside, one number or one per channel."""
    n, c, h, w = q.shape
    k = weight.shape[2]
    wide = np.empty((n, c, h + 2 * padding, w + 2 * padding), np.int64)
    wide[:] = np.asarray(fill, np.int64).reshape(1, -1, 1, 1)
    wide[:, :, padding : padding + h, padding : padding + w] = q
    rows, columns = ((side + 2 * padding - k) // stride + 1 for side in (h, w))
    sums = np.zeros((n, len(weight), rows, columns), np.int64)
    for y in range(rows):
        for x in range(columns):
            window = wide[:, :, y * stride : y * stride + k, x * stride : x * stride + k]
            sums[:, :, y, x] = np.einsum("ncij,ocij->no", window, weight)
    return sums


def averages(d0, d1, d2, d3):
    return [(d0 + 255 - d2 + 1) >> 1, (d1 + d2 + 1) >> 1, (d1 + 255 - d2 + 1) >> 1, (d1 + 255 - d3 + 1) >> 1]


SIGNS = np.array([[1, 1, -1, 0], [0, 1, 1, 1]])
"""Of the four frequencies in even and in odd outputs."""


def winograd_2d_sums(q, weight, bias):
    """F(2×2, 3×3) tile by tile, first along x, then along y; weight [O, C, 4, 4], bias [4, O]."""
    n, inputs, height, width = q.shape
    wide = np.zeros((n, inputs, height + 5, width + 5), np.int64)
    wide[:, :, 1 : height + 1, 1 : width + 1] = q
    sums = np.zeros((n, len(weight), height, width), np.int64)
    for y in range(height):
        for x in range(width):
            tile = wide[:, :, y - y % 2 : y - y % 2 + 4, x - x % 2 : x - x % 2 + 4]
            along_x = averages(*tile.transpose(3, 0, 1, 2))  # four of [N, C, rows]
            both = [averages(*v.transpose(2, 0, 1)) for v in along_x]  # [x][y] of [N, C]
            for a in range(4):
                for b in range(4):
                    sign = SIGNS[y % 2, a] * SIGNS[x % 2, b]
                    sums[:, :, y, x] += sign * (both[b][a] @ weight[:, :, a, b].T)
            sums[:, :, y, x] += bias[2 * (y % 2) + x % 2]
    return sums


def winograd_sums(q, weight, bias):
    """F(2, 3) along x by the bytes that vpavgb computes, bias included; weight [O, C, 3, 4], bias [2, O]."""
    n, inputs, height, width = q.shape
    wide = np.zeros((n, inputs, height + 2, width + 5), np.int64)
    wide[:, :, 1 : height + 1, 1 : width + 1] = q
    sums = np.zeros((n, len(weight), height, width), np.int64)
    for y in range(height):
        for x in range(width):
            d0, d1, d2, d3 = (wide[:, :, y : y + 3, x - x % 2 + i] for i in range(4))
            v = averages(d0, d1, d2, d3)
            m = [np.einsum("nci,oci->no", v[k], weight[..., k]) for k in range(4)]
            sums[:, :, y, x] = bias[x % 2] + (m[1] + m[2] + m[3] if x % 2 else m[0] + m[1] - m[2])
    return sums


def requantized(sums, scale, residual=None, ratio=None):
    """Every operation rounds to float32; halves go to the even integer."""
    with np.errstate(over="ignore"):
        scaled = sums.astype(np.float32) * scale.reshape(1, -1, 1, 1)
    if residual is not None:
        scaled = scaled + residual.astype(np.float32) * np.float32(ratio)
    assert scaled.dtype == np.float32
    return np.clip(np.rint(scaled), 0, 255).astype(np.int64)


def affine(q, scale, shift):
    scaled = q.astype(np.float32) * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)
    return np.clip(np.rint(scaled), 0, 255).astype(np.int64)


def max_pool(q, kernel, stride, padding):
    height, width = q.shape[2:]
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    result = np.empty((*q.shape[:2], rows, columns), np.int64)
    for y in range(rows):
        for x in range(columns):
            top, left = y * stride - padding, x * stride - padding
            window = q[:, :, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            result[:, :, y, x] = window.max((2, 3))
    return result


def stage_values(stage: QuantizedStage, q: torch.Tensor) -> dict[int, np.ndarray]:
    """What `stage.integers(q)` must return."""
    values = {0: q.numpy().astype(np.int64)}
    for i, step in enumerate(stage.steps):
        source = values[step.source]
        numbers = {name: value.numpy() for name, value in step.named_buffers()}
        if isinstance(step, QuantizedConvolution):
            weight, bias = numbers["weight"].astype(np.int64), numbers["bias"].astype(np.int64)
            if step.winograd:
                sums = (winograd_2d_sums if step.winograd == 2 else winograd_sums)(source, weight, bias)
            else:
                image = step.source == 0 and stage.image is not None
                fill = np.clip(np.rint(stage.image[1].numpy()), 0, 255) if image else stage.zeros[step.source]
                sums = products(source, weight, step.stride, step.padding, fill) + bias[0].reshape(1, -1, 1, 1)
            residual = values[step.residual] if step.residual >= 0 else None
            values[i + 1] = requantized(sums, numbers["scale"], residual, numbers["ratio"])
        elif isinstance(step, QuantizedAffine):
            values[i + 1] = affine(source, numbers["scale"], numbers["shift"])
        else:
            values[i + 1] = max_pool(source, step.kernel, step.stride, step.padding)
    return values
