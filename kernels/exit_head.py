"""The exit head: global average pool → logits → criterion → results and survivor list.

    pooled[r, c] = mean over pixels of features[rows[r], c];  then as in `exit_common`

With few classes one launch, here; with many, as of ImageNet, three, in `many_classes`. Bytes moved: the live samples'
maps once, the weights from the cache, 16 bytes per entry of the live list, and the results of samples that exit; with a
rule that carries, those of all live samples, in and out.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import many_classes
from .exit_common import advance, answer, begin_tile, ends_an_exit
from .launch import Launch, ceil_div, clamp_power_of_two, power_of_two, readable, strides_of
from .workspace import workspace_for

FEW_COLUMNS = 64
"""Class rows and confidence row that one program evaluates at most."""


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


def run(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and returns as of the op `eefast::exit_head`; checked by the caller."""
    lists = torch.empty_like(rows), torch.empty_like(rows), torch.empty_like(live)
    for launch in launches(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits,
        *lists, rule,
    ):  # fmt: skip
        launch.run()
    return lists


def launches(
    features: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor,
    live: Tensor, criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    next_rows: Tensor, next_positions: Tensor, next_live: Tensor, rule: Tensor | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """Those of one exit, in this order.

    The choice of kernels and blocks depends on the shape of one sample only: its additions are the same in every batch.
    """
    samples, channels, height, width = features.shape
    if height > 1 and width > 1 and features.stride(2) != width * features.stride(3):
        # The kernels read every layout except lines with gaps between them (a crop).
        features = features.contiguous(memory_format=torch.channels_last)
    features = readable(features)
    ends = exit_arguments(
        weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits,
        next_rows, next_positions, next_live, rule,
    )  # fmt: skip
    block, columns = power_of_two(channels), ends["BLOCK_COLUMNS"]
    if columns > FEW_COLUMNS or block > 4096 or columns * block > 32768:
        return many_classes.launches(features, ends)
    sample_stride, channel_stride, line_stride, pixel_stride = strides_of(features)
    sample_bytes = channels * height * width * features.element_size()
    tile_rows = clamp_power_of_two(min(32768 // sample_bytes, 4096 // (columns * block)), 8)
    warps = 4 if block <= 1024 else 8
    block_rows = 1024 * warps // (tile_rows * block)
    tiles = max(1, ceil_div(len(rows), tile_rows))
    arguments = ends | dict(
        features=features, samples=samples, workspace=workspace_for(rows.device, tiles + 2),
        # Constants, since Triton sees in an argument only whether 16 divides it: not that 8 channels are 16 bytes.
        SAMPLE_STRIDE=sample_stride, CHANNEL_STRIDE=channel_stride,
        PIXEL_STRIDE=pixel_stride if width > 1 else line_stride, PIXELS=height * width,
        CHANNELS=channels, BLOCK_CHANNELS=block, ROWS=tile_rows,
        BLOCK_PIXELS=clamp_power_of_two(block_rows, power_of_two(height * width)),
        BLOCK_CLASSES=clamp_power_of_two(block_rows, columns), WINDOW=32 * warps,
    )  # fmt: skip
    return (Launch(_few_classes_kernel, (tiles,), arguments, num_warps=warps, max_registers=96),)


def exit_arguments(
    weight: Tensor, bias: Tensor, threshold: Tensor | None, rows: Tensor, positions: Tensor, live: Tensor,
    criterion: str, exit_index: int, logits: Tensor, confidence: Tensor, exits: Tensor,
    next_rows: Tensor, next_positions: Tensor, next_live: Tensor, rule: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
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
