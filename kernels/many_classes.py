"""Maps → sums → products with class rows → results and survivor list: an exit with many classes, in three launches.

    sums[r, p, c] = sum over the pixels of part p of features[rows[r], c]
    products[r, s, k] = sum over the channels of slice s of weight[k, c] · (sum over p of sums[r, p, c]) / pixels
    logits[r, k] = bias[k] + sum over s of products[r, s, k];  then as in `exit_common`

One launch for all would take rows of the batch as its programs, each with all pixels and all classes in turn: too few
to keep the memory busy. Here a launch has a program for each part of a sample's map, for each block of class rows, for
each few samples. Parts and slices depend on the shape of one sample only and are added up in order, so a sample gets
the same bits in every batch. Bytes moved: the live samples' maps once; sums and products, float32, through L2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exit_common import advance, answer, begin_tile, ends_an_exit
from .launch import Launch, ceil_div, clamp_power_of_two, power_of_two, strides_of
from .workspace import workspace_for

# Elements of a map that a program of 256 threads reads at a time; blocks of pixels of a part, and parts of a map.
BLOCK_ELEMENTS, PART_BLOCKS, MOST_PARTS = 8192, 4, 8
# Of a product: samples, the fewest rows of the tensor cores; class rows; channels at a time and of a slice; slices.
SAMPLES, CLASS_ROWS, BLOCK_CHANNELS, SLICE, MOST_SLICES = 16, 64, 32, 512, 16
# Logits that a program decides on, where that is one sample's or more.
DECIDED = 1024


@triton.jit(do_not_specialize=["size", "samples"])
def _pool_kernel(
    features, samples, rows, live, size, sums,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, PARTS: tl.constexpr, PART_PIXELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program adds up one part of one sample's map, for BLOCK_CHANNELS channels."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    entry = tl.program_id(0) // (PARTS * blocks)
    part = tl.program_id(0) // blocks % PARTS
    if entry < tl.minimum(tl.load(live), size):
        row = tl.load(rows + entry)
        tl.device_assert((row >= 0) & (row < samples), "rows is out of range")
        channel = tl.program_id(0) % blocks * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
        start = features + row.to(tl.int64) * SAMPLE_STRIDE + channel[None, :] * CHANNEL_STRIDE
        total = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
        for first in range(0, PART_PIXELS, BLOCK_PIXELS):
            pixel = part * PART_PIXELS + first + tl.arange(0, BLOCK_PIXELS)[:, None]
            mask = (pixel < PIXELS) & (channel[None, :] < CHANNELS)
            total += tl.load(start + pixel * PIXEL_STRIDE, mask=mask, other=0.0).to(tl.float32)
        place = sums + (entry.to(tl.int64) * PARTS + part) * CHANNELS + channel
        tl.store(place, tl.sum(total, axis=0), mask=channel < CHANNELS)


@triton.jit(do_not_specialize=["size"])
def _classify_kernel(
    sums, live, size, weight, products,
    PIXELS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr, CLASSES: tl.constexpr, SLICE: tl.constexpr,
    SLICES: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A program multiplies ROWS samples by BLOCK_CLASSES class rows, over one slice of the channels."""
    blocks: tl.constexpr = (CLASSES + BLOCK_CLASSES) // BLOCK_CLASSES
    tile = tl.program_id(0) // (SLICES * blocks)
    slice = tl.program_id(0) // blocks % SLICES
    count = tl.minimum(tl.load(live), size)
    if tile * ROWS < count:
        entry = tile * ROWS + tl.arange(0, ROWS)
        alive = entry < count
        class_row = tl.program_id(0) % blocks * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
        out = tl.zeros([ROWS, BLOCK_CLASSES], tl.float32)
        for first in range(0, SLICE, BLOCK_CHANNELS):
            channel = slice * SLICE + first + tl.arange(0, BLOCK_CHANNELS)
            place = sums + entry[:, None].to(tl.int64) * (PARTS * CHANNELS) + channel[None, :]
            mask = alive[:, None] & (channel[None, :] < CHANNELS)
            pooled = tl.load(place, mask=mask, other=0.0)
            for part in tl.static_range(1, PARTS):
                pooled += tl.load(place + part * CHANNELS, mask=mask, other=0.0)
            w = tl.load(
                weight + class_row[None, :] * CHANNELS + channel[:, None],
                mask=(class_row[None, :] <= CLASSES) & (channel[:, None] < CHANNELS),
                other=0.0,
            )
            out = tl.dot(pooled / (PIXELS * 1.0), w, out, input_precision="tf32x3")
        place = products + (entry.to(tl.int64) * SLICES + slice)[:, None] * COLUMNS + class_row[None, :]
        tl.store(place, out, mask=alive[:, None] & (class_row[None, :] < COLUMNS))


@ends_an_exit
def _decide_kernel(
    products, bias, threshold, rule,
    rows, positions, live, size, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    next_rows, next_positions, next_live, workspace,
    CLASSES: tl.constexpr, CRITERION: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr, SLICES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS entries of the live list."""
    tile, entry, count, alive = begin_tile(workspace, live, size, ROWS)
    survives = tl.zeros([ROWS], tl.int32)
    if tile * ROWS < count:
        column = tl.arange(0, BLOCK_COLUMNS)
        out = tl.zeros([ROWS, BLOCK_COLUMNS], tl.float32)
        out += tl.load(bias + column, mask=column <= CLASSES, other=0.0)[None, :]
        place = products + entry[:, None].to(tl.int64) * (SLICES * COLUMNS) + column[None, :]
        for slice in tl.static_range(SLICES):
            out += tl.load(place + slice * COLUMNS, mask=alive[:, None] & (column[None, :] < COLUMNS), other=0.0)
        survives = answer(
            out, entry, alive, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
            confidence, confidence_stride, exits, exits_stride, results, exit_index, CLASSES, CRITERION, BLOCK_COLUMNS,
            THRESHOLD_STRIDE,
        )  # fmt: skip
    advance(survives, entry, tile, rows, positions, size, next_rows, next_positions, next_live, workspace, WINDOW)


def launches(features: Tensor, ends: dict[str, Any]) -> tuple[Launch, Launch, Launch]:
    """Of one exit.

    features: `readable`, [M, C, H, W], every line directly after the one before.  ends: see `exit_head.exit_arguments`.
    """
    samples, channels, height, width = features.shape
    sample_stride, channel_stride, line_stride, pixel_stride = strides_of(features)
    pixels, size = height * width, ends["size"]
    block_channels = min(power_of_two(channels), 64)
    block_pixels = min(power_of_two(pixels), BLOCK_ELEMENTS // block_channels)
    block_channels = min(power_of_two(channels), BLOCK_ELEMENTS // block_pixels)
    blocks = ceil_div(pixels, block_pixels)
    part_pixels = ceil_div(blocks, clamp_power_of_two(blocks // PART_BLOCKS, MOST_PARTS)) * block_pixels
    parts = ceil_div(pixels, part_pixels)
    sums = features.new_empty(size, parts, channels, dtype=torch.float32)
    arguments = dict(
        features=features, samples=samples, rows=ends["rows"], live=ends["live"], size=size, sums=sums,
        # Constants for the reason given in exit_head.
        SAMPLE_STRIDE=sample_stride, CHANNEL_STRIDE=channel_stride,
        PIXEL_STRIDE=pixel_stride if width > 1 else line_stride, PIXELS=pixels, CHANNELS=channels, PARTS=parts,
        PART_PIXELS=part_pixels, BLOCK_PIXELS=block_pixels, BLOCK_CHANNELS=block_channels,
    )  # fmt: skip
    grid = max(1, size) * parts * ceil_div(channels, block_channels)
    warps = clamp_power_of_two(block_pixels * block_channels // 1024, 8)
    pool = Launch(_pool_kernel, (grid,), arguments, num_warps=warps, max_registers=128)
    return pool, *launches_from_sums(sums, pixels, ends)


def launches_from_sums(sums: Tensor, pixels: int, ends: dict[str, Any]) -> tuple[Launch, Launch]:
    """Those after the pooling.

    sums: [R, parts, C] float32, of `pixels` pixels in all.
    """
    size, parts, channels = sums.shape
    classes = ends["CLASSES"]
    slice = max(SLICE, ceil_div(channels, MOST_SLICES * BLOCK_CHANNELS) * BLOCK_CHANNELS)
    slice = min(slice, ceil_div(channels, BLOCK_CHANNELS) * BLOCK_CHANNELS)
    slices = ceil_div(channels, slice)
    # A multiple of 4, so that 16 bytes are moved at a time.
    columns = ceil_div(classes + 1, 4) * 4
    products = sums.new_empty(size, slices, columns)
    arguments = dict(
        sums=sums, live=ends["live"], size=size, weight=ends["weight"], products=products, PIXELS=pixels, PARTS=parts,
        CHANNELS=channels, CLASSES=classes, SLICE=slice, SLICES=slices, COLUMNS=columns, ROWS=SAMPLES,
        BLOCK_CLASSES=CLASS_ROWS, BLOCK_CHANNELS=BLOCK_CHANNELS,
    )  # fmt: skip
    grid = max(1, ceil_div(size, SAMPLES)) * slices * ceil_div(classes + 1, CLASS_ROWS)
    classify = Launch(_classify_kernel, (grid,), arguments, num_stages=4, max_registers=128)

    block_columns = ends["BLOCK_COLUMNS"]
    tile_rows, warps = clamp_power_of_two(DECIDED // block_columns, 16), max(4, min(block_columns // 256, 16))
    tiles = max(1, ceil_div(size, tile_rows))
    taken = {name: value for name, value in ends.items() if name in _decide_kernel.arg_names}
    arguments = taken | dict(
        products=products, workspace=workspace_for(ends["rows"].device, tiles + 2), SLICES=slices, COLUMNS=columns,
        ROWS=tile_rows, WINDOW=32 * warps,
    )  # fmt: skip
    return classify, Launch(_decide_kernel, (tiles,), arguments, num_warps=warps, max_registers=128)
