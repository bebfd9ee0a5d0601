"""The exit head in one launch: global average pool → logits → criterion → results and survivor list.

    pooled[r, c] = mean over pixels of features[rows[r], c];  then as in `exit_common`

Bytes moved: the live samples' maps once, the weights from the cache, 16 bytes per entry of the live list, and the
results of samples that exit; with a rule that carries, those of all live samples, in and out. With many classes
(ImageNet) also pooled features and logits, float32, through L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exit_common import advance, answer, answer_from, begin_tile, classify, ends_an_exit
from .launch import Launch, ceil_div, clamp_power_of_two, power_of_two, readable, strides_of
from .workspace import workspace_for


@triton.jit
def _pool(
    features, row, alive, channel,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean over the pixels of some channels, [ROWS, BLOCK_CHANNELS] float32; the order of the additions is fixed."""
    channel = channel[None, None, :]
    start = features + row.to(tl.int64)[:, None, None] * SAMPLE_STRIDE + channel * CHANNEL_STRIDE
    sums = tl.zeros([ROWS, BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
    for first in range(0, PIXELS, BLOCK_PIXELS):
        pixel = first + tl.arange(0, BLOCK_PIXELS)[None, :, None]
        mask = alive[:, None, None] & (pixel < PIXELS) & (channel < CHANNELS)
        sums += tl.load(start + pixel * PIXEL_STRIDE, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=1) / (PIXELS * 1.0)


@ends_an_exit
def _few_classes_kernel(
    features, samples, weight, bias, threshold, rule,
    rows, positions, live, size, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    next_rows, next_positions, next_live, workspace,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, CLASSES: tl.constexpr, CRITERION: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Everything in registers; a tile is ROWS entries of the live list."""
    tile, entry, count, alive = begin_tile(workspace, live, size, ROWS)
    survives = tl.zeros([ROWS], tl.int32)
    if tile * ROWS < count:
        row = tl.load(rows + entry, mask=alive, other=0)
        tl.device_assert((row >= 0) & (row < samples), "rows is out of range", mask=alive)
        channel = tl.arange(0, BLOCK_CHANNELS)
        pooled = _pool(
            features, row, alive, channel, SAMPLE_STRIDE, CHANNEL_STRIDE, PIXEL_STRIDE, PIXELS,
            CHANNELS, ROWS, BLOCK_PIXELS, BLOCK_CHANNELS,
        )  # fmt: skip
        column = tl.arange(0, BLOCK_COLUMNS)
        out = tl.zeros([ROWS, BLOCK_COLUMNS], tl.float32)
        for first in range(0, CLASSES + 1, BLOCK_CLASSES):
            weight_row = first + tl.arange(0, BLOCK_CLASSES)
            w = tl.load(
                weight + weight_row[:, None] * CHANNELS + channel[None, :],
                mask=(weight_row[:, None] <= CLASSES) & (channel[None, :] < CHANNELS),
                other=0.0,
            )
            sums = tl.sum(pooled[:, None, :] * w[None, :, :], axis=2)
            if BLOCK_CLASSES == BLOCK_COLUMNS:
                out = sums
            else:
                here = (weight_row[:, None] == column[None, :])[None, :, :]
                out += tl.sum(tl.where(here, sums[:, :, None], 0.0), axis=1)
        out += tl.load(bias + column, mask=column <= CLASSES, other=0.0)[None, :]
        survives = answer(
            out, entry, alive, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
            confidence, confidence_stride, exits, exits_stride, results, exit_index, CLASSES, CRITERION, BLOCK_COLUMNS,
            THRESHOLD_STRIDE,
        )  # fmt: skip
    advance(survives, entry, tile, rows, positions, size, next_rows, next_positions, next_live, workspace, WINDOW)


@ends_an_exit
def _many_classes_kernel(
    features, samples, weight, bias, threshold, rule,
    rows, positions, live, size, logits, logits_row_stride, logits_column_stride,
    confidence, confidence_stride, exits, exits_stride, results, exit_index,
    next_rows, next_positions, next_live, workspace, pooled, scratch,
    SAMPLE_STRIDE: tl.constexpr, CHANNEL_STRIDE: tl.constexpr, PIXEL_STRIDE: tl.constexpr, PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr, CLASSES: tl.constexpr, CRITERION: tl.constexpr, THRESHOLD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    POOL_ROWS: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, DOT_CLASSES: tl.constexpr, DOT_CHANNELS: tl.constexpr, PART: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """ROWS samples share one pass over the weights, on the tensor cores."""
    tile, entry, count, alive = begin_tile(workspace, live, size, ROWS)
    survives = tl.zeros([ROWS], tl.int32)
    if tile * ROWS < count:
        for first in tl.range(0, ROWS, POOL_ROWS, num_stages=1):
            part = tile * ROWS + first + tl.arange(0, POOL_ROWS)
            part_alive = part < count
            row = tl.load(rows + part, mask=part_alive, other=0)
            tl.device_assert((row >= 0) & (row < samples), "rows is out of range", mask=part_alive)
            for start in tl.range(0, CHANNELS, BLOCK_CHANNELS, num_stages=1):
                channel = start + tl.arange(0, BLOCK_CHANNELS)
                means = _pool(
                    features, row, part_alive, channel, SAMPLE_STRIDE, CHANNEL_STRIDE, PIXEL_STRIDE, PIXELS,
                    CHANNELS, POOL_ROWS, BLOCK_PIXELS, BLOCK_CHANNELS,
                )  # fmt: skip
                place = pooled + part[:, None].to(tl.int64) * CHANNELS + channel[None, :]
                tl.store(place, means, mask=part_alive[:, None] & (channel[None, :] < CHANNELS))
        tl.debug_barrier()
        classify(pooled, weight, bias, scratch, entry, alive, CHANNELS, CLASSES, ROWS, DOT_CLASSES, DOT_CHANNELS)
        survives = answer_from(
            scratch, tile, count, threshold, rule, positions, logits, logits_row_stride, logits_column_stride,
            confidence, confidence_stride, exits, exits_stride, results, exit_index,
            CLASSES, CRITERION, BLOCK_COLUMNS, THRESHOLD_STRIDE, ROWS, PART,
        )  # fmt: skip
    advance(survives, entry, tile, rows, positions, size, next_rows, next_positions, next_live, workspace, WINDOW)


def run(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and returns as of the op `eefast::exit_head`; checked by the caller."""
    lists = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(live)
    launch(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits,
        *lists, rule,
    ).run()  # fmt: skip
    return lists


def launch(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    next_rows: Tensor, next_positions: Tensor, next_live: Tensor, rule: Tensor | None = None,
) -> Launch:  # fmt: skip
    """The launch of one exit.

    The choice of kernel and blocks depends on the shape of one sample only: its additions are the same in every batch.
    """
    samples, channels, height, width = features.shape
    classes, size = len(bias) - 1, len(rows)
    if height > 1 and width > 1 and features.stride(2) != width * features.stride(3):
        # The kernels read every layout except lines with gaps between them (a crop).
        features = features.contiguous(memory_format=torch.channels_last)
    features = readable(features)
    sample_stride, channel_stride, line_stride, pixel_stride = strides_of(features)
    arguments = dict(
        features=features, samples=samples,
        # Constants, since Triton sees in an argument only whether 16 divides it: not that 8 channels are 16 bytes.
        SAMPLE_STRIDE=sample_stride, CHANNEL_STRIDE=channel_stride,
        PIXEL_STRIDE=pixel_stride if width > 1 else line_stride, PIXELS=height * width,
        **exit_arguments(
            weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits,
            next_rows, next_positions, next_live, rule,
        ),
        CHANNELS=channels, BLOCK_CHANNELS=min(power_of_two(channels), 4096),
    )  # fmt: skip
    block, columns, pixels = power_of_two(channels), power_of_two(classes + 1), power_of_two(height * width)
    if columns <= 64 and block <= 4096 and columns * block <= 32768:
        sample_bytes = channels * height * width * features.element_size()
        tile_rows = clamp_power_of_two(min(32768 // sample_bytes, 4096 // (columns * block)), 8)
        warps = 4 if block <= 1024 else 8
        shape = dict(
            ROWS=tile_rows,
            BLOCK_PIXELS=clamp_power_of_two(1024 * warps // (tile_rows * block), pixels),
            BLOCK_CLASSES=clamp_power_of_two(1024 * warps // (tile_rows * block), columns),
        )  # fmt: skip
        kernel, extra, registers = _few_classes_kernel, {}, 96
    else:
        tile_rows, warps = 16, 8
        block = min(block, 4096)
        pool_rows = clamp_power_of_two(4096 // block, tile_rows)
        shape = dict(
            ROWS=tile_rows, POOL_ROWS=pool_rows, BLOCK_PIXELS=clamp_power_of_two(4096 // (pool_rows * block), pixels),
            DOT_CLASSES=64, DOT_CHANNELS=32,
            # A rule needs registers for the answer so far.
            PART=clamp_power_of_two((4096 if rule is None else 2048) // columns, tile_rows),
        )  # fmt: skip
        kernel, registers = _many_classes_kernel, 128
        extra = dict(
            pooled=features.new_empty(size, channels, dtype=torch.float32),
            scratch=features.new_empty(size, classes + 1, dtype=torch.float32),
        )
    tiles = max(1, ceil_div(size, tile_rows))
    arguments |= dict(workspace=workspace_for(rows.device, tiles + 2), WINDOW=32 * warps, **shape, **extra)
    return Launch(kernel, (tiles,), arguments, num_warps=warps, max_registers=registers)


def exit_arguments(
    weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor, live: Tensor,
    criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    next_rows: Tensor, next_positions: Tensor, next_live: Tensor, rule: Tensor | None,
) -> dict[str, object]:  # fmt: skip
    """The arguments for `exit_common`, by parameter name."""
    of_each = threshold is not None and threshold.dim() == 1
    if threshold is not None and of_each and threshold.stride(0) > 1:
        threshold = threshold.contiguous()
    return dict(
        weight=weight.contiguous(), bias=bias.contiguous(), threshold=threshold,
        rule=None if rule is None else rule.contiguous(), rows=rows.contiguous(), positions=positions.contiguous(),
        live=live, size=len(rows), logits=logits, logits_row_stride=logits.stride(0),
        logits_column_stride=logits.stride(1), confidence=confidence, confidence_stride=confidence.stride(0),
        exits=exits, exits_stride=exits.stride(0), results=len(exits), exit_index=exit_index, next_rows=next_rows,
        next_positions=next_positions, next_live=next_live, CLASSES=len(bias) - 1, CRITERION=criterion,
        BLOCK_COLUMNS=power_of_two(len(bias)),
        THRESHOLD_STRIDE=threshold.stride(0) if threshold is not None and of_each else -1,
    )  # fmt: skip
