"""Gather of the survivors' maps into contiguous rows; the device-side count says how many.

    out[offset + i] = features[rows[i]] for i < live;  no other rows of `out` are written

Bytes moved: the survivors' maps, once read and once written, in 16-byte vectors.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, ceil_div, power_of_two, strides_of

TILE = 8192


@triton.jit(do_not_specialize=["samples", "size", "places"])
def _gather_survivors_kernel(
    features, samples, rows, live, size, out, offset, places,
    SAMPLE_STRIDE: tl.constexpr, OUT_STRIDE: tl.constexpr, ELEMENTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program copies BLOCK elements of each of ROWS samples."""
    parts: tl.constexpr = (ELEMENTS + BLOCK - 1) // BLOCK
    entry = tl.program_id(0) // parts * ROWS + tl.arange(0, ROWS)
    count = tl.minimum(tl.load(live), size)
    alive = entry < count
    element = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + entry, mask=alive, other=0)
    tl.device_assert((row >= 0) & (row < samples), "rows is out of range", mask=alive)
    mask = alive[:, None] & (element[None, :] < ELEMENTS)
    values = tl.load(features + row.to(tl.int64)[:, None] * SAMPLE_STRIDE + element[None, :], mask=mask)
    place = entry
    if offset is not None:
        place += tl.load(offset)
        tl.device_assert((place >= 0) & (place < places), "offset is out of range", mask=alive)
    tl.store(out + place.to(tl.int64)[:, None] * OUT_STRIDE + element[None, :], values, mask=mask)


def run(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None) -> None:
    """Arguments as of the op `eefast::gather_survivors`; checked by the caller."""
    launch(features, rows, live, out, offset).run()


def launch(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> Launch:
    elements = math.prod(features.shape[1:])
    block = min(TILE, power_of_two(elements))
    tile_rows = TILE // block
    grid = max(1, ceil_div(len(rows), tile_rows)) * ceil_div(elements, block)
    arguments = dict(
        features=features, samples=len(features), rows=rows.contiguous(), live=live, size=len(rows), out=out,
        offset=offset, places=len(out),
        SAMPLE_STRIDE=strides_of(features)[0], OUT_STRIDE=strides_of(out)[0], ELEMENTS=elements,
        ROWS=tile_rows, BLOCK=block,
    )  # fmt: skip
    return Launch(_gather_survivors_kernel, (grid,), arguments, num_warps=8)
