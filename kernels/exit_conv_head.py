"""An exit head with a convolution: conv3x3 + bias + ReLU → global average pool → as `exit_head`.

    map[k, y, x] = max(0, conv_bias[k] + Σ over c, i, j of conv_weight[k, c, i, j] · features[rows[r], c, y+i-1, x+j-1])
    pooled[r, k] = mean over y, x of map;  then as in `exit_common`

An implicit matrix product on the tensor cores, pixels × (9·C) × output channels. Bytes moved: the live samples' maps
once (neighbouring taps come from the caches), the weights from the cache; the convolution's output never leaves the
registers, which saves writing and reading a map of the same size. With few classes one launch; with many the launch
ends with the pooling, and `many_classes` follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import many_classes
from .convolution import add_product, needs_upcast
from .exit_common import advance, answer_from, begin_tile, classify, ends_an_exit
from .exit_head import FEW_COLUMNS, exit_arguments
from .launch import Launch, ceil_div, clamp_power_of_two, power_of_two, readable, strides_of
from .workspace import workspace_for

# Pixels that go through the tensor cores at a time, of one sample or of several small ones.
TILE_PIXELS, MAX_ROWS = 128, 16


@ends_an_exit
def _conv_kernel(
    features, samples, steps, conv_weight, conv_bias,
    weight, bias, threshold, rule, rows, positions, live, size, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    next_rows, next_positions, next_live, workspace, pooled, scratch,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, LINE_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    IN_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    CLASSES: tl.constexpr, CRITERION: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, PART: tl.constexpr, UPCAST: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """A tile is ROWS entries of the live list, BLOCK_PIXELS pixels of each at a time."""
    tile, entry, count, alive = begin_tile(workspace, live, size, ROWS)
    survives = tl.zeros([ROWS], tl.int32)
    if tile * ROWS < count:
        for first_out in tl.range(0, CHANNELS, BLOCK_OUT, num_stages=1):
            _pool_maps(
                features, samples, steps, conv_weight, conv_bias, rows, tile, first_out, count, pooled,
                SAMPLE_STRIDE, CHANNEL_STRIDE, LINE_STRIDE, PIXEL_STRIDE, IN_CHANNELS, CHANNELS, HEIGHT, WIDTH, ROWS,
                BLOCK_PIXELS, BLOCK_IN, BLOCK_OUT, UPCAST,
            )  # fmt: skip
        tl.debug_barrier()
        classify(pooled, weight, bias, scratch, entry, alive, CHANNELS, CLASSES, ROWS, BLOCK_CLASSES, BLOCK_CHANNELS)
        survives = answer_from(
            scratch, tile, count, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
            confidence, confidence_stride, exits, exits_stride, results, exit_index,
            CLASSES, CRITERION, BLOCK_COLUMNS, THRESHOLD_STRIDE, ROWS, PART,
        )  # fmt: skip
    advance(survives, entry, tile, rows, positions, size, next_rows, next_positions, next_live, workspace, WINDOW)


@triton.jit(do_not_specialize=["size", "samples"])
def _conv_pool_kernel(
    features, samples, steps, conv_weight, conv_bias, rows, live, size, pooled,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, LINE_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    IN_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A program pools BLOCK_OUT output channels of ROWS samples."""
    blocks: tl.constexpr = (CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    tile = tl.program_id(0) // blocks
    count = tl.minimum(tl.load(live), size)
    if tile * ROWS < count:
        _pool_maps(
            features, samples, steps, conv_weight, conv_bias, rows, tile, tl.program_id(0) % blocks * BLOCK_OUT, count,
            pooled, SAMPLE_STRIDE, CHANNEL_STRIDE, LINE_STRIDE, PIXEL_STRIDE, IN_CHANNELS, CHANNELS, HEIGHT, WIDTH,
            ROWS, BLOCK_PIXELS, BLOCK_IN, BLOCK_OUT, UPCAST,
        )  # fmt: skip


@triton.jit
def _pool_maps(
    features, samples, steps, conv_weight, conv_bias, rows, tile, first_out, count, pooled,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, LINE_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    IN_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Means over the pixels of BLOCK_OUT output channels of a tile's samples, into `pooled`, [R, CHANNELS] float32."""
    entry = tile * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, ROWS * BLOCK_PIXELS)
    owner = tile * ROWS + item // BLOCK_PIXELS
    row = tl.load(rows + owner, mask=owner < count, other=0)
    tl.device_assert((row >= 0) & (row < samples), "rows is out of range", mask=owner < count)
    start = features + row.to(tl.int64) * SAMPLE_STRIDE
    filters = first_out + tl.arange(0, BLOCK_OUT)
    conv_shift = tl.load(conv_bias + filters, mask=filters < CHANNELS, other=0.0)
    totals = tl.zeros([ROWS, BLOCK_OUT], tl.float32)
    for first_pixel in tl.range(0, HEIGHT * WIDTH, BLOCK_PIXELS, num_stages=1):
        pixel = first_pixel + item % BLOCK_PIXELS
        inside = (owner < count) & (pixel < HEIGHT * WIDTH)
        maps = _convolve(
            start, steps, conv_weight, pixel // WIDTH, pixel % WIDTH, inside, filters,
            CHANNEL_STRIDE, LINE_STRIDE, PIXEL_STRIDE, IN_CHANNELS, CHANNELS, HEIGHT, WIDTH,
            BLOCK_IN, BLOCK_OUT, UPCAST,
        )  # fmt: skip
        maps = maps + conv_shift[None, :]
        # Not tl.maximum, which would turn NaN into 0 and let its sample exit.
        maps = tl.where((maps <= 0.0) | (inside[:, None] == 0), 0.0, maps)
        totals += tl.sum(tl.reshape(maps, [ROWS, BLOCK_PIXELS, BLOCK_OUT]), axis=1)
    place = pooled + entry[:, None].to(tl.int64) * CHANNELS + filters[None, :]
    means = totals / (HEIGHT * WIDTH * 1.0)
    tl.store(place, means, mask=(entry < count)[:, None] & (filters[None, :] < CHANNELS))


@triton.jit
def _convolve(
    start, steps, conv_weight, y, x, inside, filters,
    CHANNEL_STRIDE: tl.constexpr, LINE_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr,
    IN_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The convolution's sums for pixels (y, x) of the samples at `start`: [pixels, BLOCK_OUT] float32."""
    blocks: tl.constexpr = (IN_CHANNELS + BLOCK_IN - 1) // BLOCK_IN
    sums = tl.zeros([y.shape[0], BLOCK_OUT], tl.float32)
    # An argument, so that the loop is not unrolled, which would take too many registers.
    for step in range(0, steps):
        tap = step // blocks
        channel = step % blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
        line, place = y + tap // 3 - 1, x + tap % 3 - 1
        there = inside & (line >= 0) & (line < HEIGHT) & (place >= 0) & (place < WIDTH)
        offset = line * LINE_STRIDE + place * PIXEL_STRIDE
        sums = add_product(
            sums,
            start[:, None] + offset[:, None] + channel[None, :] * CHANNEL_STRIDE,
            there[:, None] & (channel[None, :] < IN_CHANNELS),
            conv_weight + filters[None, :] * (9 * IN_CHANNELS) + tap * IN_CHANNELS + channel[:, None],
            (filters[None, :] < CHANNELS) & (channel[:, None] < IN_CHANNELS),
            UPCAST,
        )
    return sums


def run(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and returns as of the op `eefast::exit_conv_head`; checked by the caller."""
    lists = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(live)
    for launch in launches(
        features, conv_weight, conv_bias, weight, bias, threshold, rows, positions, live, criterion, exit_index,
        logits, confidence, exits, *lists, rule,
    ):  # fmt: skip
        launch.run()
    return lists


def launches(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, next_rows: Tensor, next_positions: Tensor, next_live: Tensor,
    rule: Tensor | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """Those of one exit, in this order; their blocks depend on the shape of one sample only."""
    features = readable(features)
    samples, in_channels, height, width = features.shape
    sample_stride, channel_stride, line_stride, pixel_stride = strides_of(features)
    channels, size = len(conv_bias), len(rows)
    block_pixels = min(TILE_PIXELS, power_of_two(height * width))
    tile_rows = min(TILE_PIXELS // block_pixels, MAX_ROWS)
    # Float32 is split into three products in registers, which leaves room for fewer output channels.
    wide = features.element_size() > 2
    block_out = max(16, min(power_of_two(channels), 32 if wide else 128))
    block_in = max(16, min(power_of_two(in_channels), 32 if wide else 64))
    # Below 16 channels every element is loaded separately and its address takes registers.
    options = dict(num_warps=8 if wide or block_out > 64 or in_channels < 16 else 4, num_stages=2 if wide else 3)
    tiles = max(1, ceil_div(size, tile_rows))
    ends = exit_arguments(
        weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits,
        next_rows, next_positions, next_live, rule,
    )  # fmt: skip
    pooled = features.new_empty(size, channels, dtype=torch.float32)
    arguments = dict(
        features=features, samples=samples, steps=9 * ceil_div(in_channels, block_in),
        # Constants for the reason given in exit_head.
        SAMPLE_STRIDE=sample_stride, CHANNEL_STRIDE=channel_stride, LINE_STRIDE=line_stride, PIXEL_STRIDE=pixel_stride,
        conv_weight=conv_weight.contiguous(memory_format=torch.channels_last), conv_bias=conv_bias.contiguous(),
        rows=ends["rows"], live=live, size=size, pooled=pooled,
        IN_CHANNELS=in_channels, CHANNELS=channels, HEIGHT=height, WIDTH=width, ROWS=tile_rows,
        BLOCK_PIXELS=block_pixels, BLOCK_IN=block_in, BLOCK_OUT=block_out, UPCAST=needs_upcast(features),
    )  # fmt: skip
    columns = ends["BLOCK_COLUMNS"]
    if columns > FEW_COLUMNS:
        pool = Launch(_conv_pool_kernel, (tiles * ceil_div(channels, block_out),), arguments, **options)
        return pool, *many_classes.launches_from_sums(pooled[:, None], 1, ends)
    block_channels = min(32, max(16, power_of_two(channels)))
    product = 64 * 16 if tile_rows >= 16 else 2048 // block_channels
    arguments |= ends | dict(
        workspace=workspace_for(rows.device, tiles + 2),
        scratch=features.new_empty(size, len(bias), dtype=torch.float32),
        BLOCK_CLASSES=clamp_power_of_two(product // tile_rows, columns), BLOCK_CHANNELS=block_channels,
        PART=clamp_power_of_two(4096 // columns, tile_rows), WINDOW=32 * options["num_warps"],
    )  # fmt: skip
    return (Launch(_conv_kernel, (tiles,), arguments, **options),)
