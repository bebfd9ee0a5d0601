"""A convolution that reads its samples through the survivor list: conv → + bias → + residual → ReLU, in one launch.

    out[i, k, y, x] = act(bias[k] + residual[q(i), k, y, x]          r(i), q(i): i or rows[i]
        + Σ over c, u, v of weight[k, c, u, v] · features[r(i), c, stride·y+u-pad, stride·x+v-pad])    for i < live

An implicit matrix product on the tensor cores, (live · pixels) × (taps · C_in) × C_out. The number of survivors is read
from device memory, and a fixed number of programs shares the tiles: a recorded launch fits any number.
Bytes moved: the live samples' maps once (neighbouring taps come from the caches), the weights from the cache, the
residual and the output once. The survivors are not gathered first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .convolution import add_product, needs_upcast
from .launch import Launch, ceil_div, power_of_two

WARPS = 8
# Programs per multiprocessor, as many as fit at most; where fewer fit, the others wait, then take their share of tiles.
PROGRAMS = 4
# What the interpreter and ahead-of-time compilation take for the number of multiprocessors: that of an H100.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Blocks:
    """A tile: output pixels, output channels, and how many of the taps · channels are multiplied at a time."""

    pixels: int
    channels: int
    inner: int
    stages: int
    max_registers: int | None


@triton.jit(do_not_specialize=["samples", "size", "steps"])
def _indexed_conv_kernel(
    features, samples, rows, live, size, steps, weight, bias, residual, out,
    IN_CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, RELU: tl.constexpr,
    RESIDUAL_THROUGH_ROWS: tl.constexpr, FEATURES_IN_ORDER: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_PIXELS output pixels, of any number of samples, times BLOCK_OUT output channels."""
    out_pixels: tl.constexpr = OUT_HEIGHT * OUT_WIDTH
    inner: tl.constexpr = KERNEL * KERNEL * IN_CHANNELS
    # Tiles of the same pixels follow each other, so that they run at the same time and read a map once.
    columns: tl.constexpr = (CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    count = tl.minimum(tl.load(live), size)
    tiles = tl.cdiv(count.to(tl.int64) * out_pixels, BLOCK_PIXELS).to(tl.int32) * columns
    item = tl.arange(0, BLOCK_PIXELS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=1):
        # One division in 64 bits, of a scalar; the others stay below a map and a tile.
        first = tl.cast(tile // columns, tl.int64) * BLOCK_PIXELS
        pixel = (first % out_pixels).to(tl.int32) + item
        entry = (first // out_pixels).to(tl.int32) + pixel // out_pixels
        pixel = pixel % out_pixels
        filters = tile % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        alive = entry < count
        row = entry
        if rows is not None:
            row = tl.load(rows + entry, mask=alive, other=0)
            tl.device_assert((row >= 0) & (row < samples), "rows is out of range", mask=alive)
        sample = row
        if FEATURES_IN_ORDER:
            sample = entry
        sums = _convolve(
            features, steps, weight, bias, sample, pixel, alive, filters, IN_CHANNELS, HEIGHT, WIDTH, CHANNELS,
            OUT_WIDTH, KERNEL, STRIDE, BLOCK_PIXELS, BLOCK_OUT, BLOCK_IN, UPCAST, inner,
        )  # fmt: skip
        mask = alive[:, None] & (filters[None, :] < CHANNELS)
        place = (first + item)[:, None] * CHANNELS + filters[None, :]
        if residual is not None:
            origin = place
            if RESIDUAL_THROUGH_ROWS:
                origin = (row.to(tl.int64) * out_pixels + pixel)[:, None] * CHANNELS + filters[None, :]
            sums += tl.load(residual + origin, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            # Not tl.maximum, which would turn NaN into 0.
            sums = tl.where(sums <= 0.0, 0.0, sums)
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _convolve(
    features, steps, weight, bias, row, pixel, alive, filters,
    IN_CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    OUT_WIDTH: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, UPCAST: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The convolution with its bias for output pixels of the samples `row`: [BLOCK_PIXELS, BLOCK_OUT] float32.

    What is multiplied at a time is BLOCK_IN of the taps · channels in their order in the weights, so few channels fill
    it with several taps.
    """
    line, place = pixel // OUT_WIDTH * STRIDE - KERNEL // 2, pixel % OUT_WIDTH * STRIDE - KERNEL // 2
    start = features + row.to(tl.int64) * (HEIGHT * WIDTH * IN_CHANNELS) + (line * WIDTH + place) * IN_CHANNELS
    # Added now: at the end, together with the residual, it would take too many registers.
    shift = tl.load(bias + filters, mask=filters < CHANNELS, other=0.0)
    sums = tl.zeros([BLOCK_PIXELS, BLOCK_OUT], tl.float32) + shift[None, :]
    # An argument, so that the loop is not unrolled, which would take too many registers.
    for step in range(0, steps):
        index = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        tap, channel = index // IN_CHANNELS, index % IN_CHANNELS
        below, right = tap // KERNEL, tap % KERNEL
        there = alive[:, None] & (index < INNER)[None, :]
        if KERNEL > 1:
            y, x = line[:, None] + below[None, :], place[:, None] + right[None, :]
            there = there & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
        offset = (below * WIDTH + right) * IN_CHANNELS + channel
        sums = add_product(
            sums,
            start[:, None] + offset[None, :],
            there,
            weight + filters[None, :] * INNER + index[:, None],
            (filters[None, :] < CHANNELS) & (index[:, None] < INNER),
            UPCAST,
        )
    return sums


def run(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, out: Tensor, features_in_order: bool = False,
) -> None:  # fmt: skip
    """Arguments as of the op `eefast::indexed_conv`, checked by the caller; `out` is what the op returns."""
    launch(
        features, weight, bias, residual, rows, residual_through_rows, live, stride, relu, out, features_in_order
    ).run()  # fmt: skip


def launch(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, out: Tensor, features_in_order: bool = False,
) -> Launch:  # fmt: skip
    """The launch; its blocks depend on the shape of one sample only."""
    samples, in_channels, height, width = features.shape
    size, channels, out_height, out_width = out.shape
    kernel, element_size = weight.shape[-1], features.element_size()
    inner = kernel**2 * in_channels
    through_rows = residual is not None and rows is not None and residual_through_rows
    readable = [] if features_in_order else [samples]
    readable += [len(residual)] if residual is not None and through_rows else []
    tile = blocks(out_height * out_width, channels, inner, in_channels * element_size, element_size)
    tiles = ceil_div(size * out_height * out_width, tile.pixels) * ceil_div(channels, tile.channels)
    arguments = dict(
        features=features, samples=min(readable, default=samples),
        rows=rows if rows is None else rows.contiguous(), live=live, size=size, steps=ceil_div(inner, tile.inner),
        weight=weight, bias=bias.contiguous(), residual=residual, out=out,
        # Constants for the reason given in exit_head.
        IN_CHANNELS=in_channels, HEIGHT=height, WIDTH=width, CHANNELS=channels, OUT_HEIGHT=out_height,
        OUT_WIDTH=out_width, KERNEL=kernel, STRIDE=stride, RELU=relu, RESIDUAL_THROUGH_ROWS=through_rows,
        FEATURES_IN_ORDER=features_in_order,
        BLOCK_PIXELS=tile.pixels, BLOCK_OUT=tile.channels, BLOCK_IN=tile.inner,
        UPCAST=needs_upcast(features),
    )  # fmt: skip
    grid = max(1, min(tiles, PROGRAMS * _multiprocessors(features.device)))
    return Launch(
        _indexed_conv_kernel, (grid,), arguments, num_warps=WARPS, num_stages=tile.stages,
        max_registers=tile.max_registers,
    )  # fmt: skip


def blocks(out_pixels: int, channels: int, inner: int, pixel_bytes: int, element_size: int) -> Blocks:
    """By the shape of one sample. Both factors of all stages fit into 99 KB of shared memory, nothing is spilled.

    inner: taps · input channels; pixel_bytes: all input channels of one pixel.
    """
    block_out, block_inner = max(16, power_of_two(channels)), max(16, min(power_of_two(inner), 32))
    if element_size > 2:
        # Float32 is split into three products in registers, which leaves room for fewer output channels.
        return Blocks(128, min(block_out, 32), block_inner, 2, None)
    if pixel_bytes % 16:
        # Loads narrower than 16 bytes have more addresses, which are kept in registers too.
        return Blocks(128, min(block_out, 64), block_inner, 4, None)
    # With 128 registers two programs fit on a multiprocessor: one computes while the other begins or ends a tile.
    if block_out < 128:
        return Blocks(128, block_out, block_inner, 4, 128)
    # Survivors on the smallest maps are few pixels; smaller tiles keep more multiprocessors busy. On larger ones large
    # tiles read less through the L2 cache, which bounds them.
    return Blocks(64, 128, block_inner, 4, 128) if out_pixels <= 64 else Blocks(128, 128, block_inner, 4, None)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
