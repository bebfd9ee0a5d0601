"""Gather of the survivors' maps into a buffer, for stages that want contiguous rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_apart, check_fake, check_range_on_cuda, check_stored, check_traced, check_written
from .library import define, namespace
from .on_cuda import implement_on_cuda

LAYOUTS = (torch.contiguous_format, torch.channels_last)

for _name in ("gather_survivors", "gather_survivors_cuda"):
    define(f"{_name}(Tensor features, Tensor rows, Tensor live, Tensor(a!) out, Tensor? offset=None) -> ()")


def reference(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    """`gather_survivors` in plain PyTorch: its oracle, its fallback and its documentation."""
    check(features, rows, live, out, offset)
    count, first = int(live), 0 if offset is None else int(offset)
    if out.is_contiguous(memory_format=torch.channels_last):
        features, out = features.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1)
    torch.index_select(features, 0, rows[:count], out=out[first : first + count])


def check(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None) -> None:
    """`RuntimeError` unless the arguments fit."""
    read = (("features", features), ("rows", rows), ("live", live), ("offset", offset))
    check_stored(*read, ("out", out), optional=["offset"])
    if features.dim() != 4 or 0 in features.shape[1:]:
        raise RuntimeError(
            f"features has shape {list(features.shape)}; expected [M, C, H, W] with at least one channel and one pixel"
        )
    if list(out.shape[1:]) != list(features.shape[1:]) or (offset is None and len(out) != rows.numel()):
        expected = f"[{rows.numel() if offset is None else 'S'}, {', '.join(map(str, features.shape[1:]))}]"
        raise RuntimeError(f"out has shape {list(out.shape)}; expected {expected}")
    if out.dtype != features.dtype:
        raise RuntimeError(f"out is {out.dtype}; convert it with .to({features.dtype}), as features")
    if not any(features[:1].is_contiguous(memory_format=m) and out[:1].is_contiguous(memory_format=m) for m in LAYOUTS):
        raise RuntimeError(
            f"features has strides {features.stride()} and out {out.stride()}; make the rows of both contiguous or the "
            "rows of both channels-last"
        )
    given = [("live", live)] if offset is None else [("live", live), ("offset", offset)]
    for name, tensor, shape in (("rows", rows, [rows.numel()]), *((*one, [1]) for one in given)):
        if tensor.dtype != torch.int32:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to(torch.int32)")
        if list(tensor.shape) != shape:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
    for name, tensor in (("rows", rows), *given, ("out", out)):
        if tensor.device != features.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {features.device}, where features is")
    check_written("out", out)
    check_apart([("out", out)], read)
    # On a GPU reading the indices would wait for the device; there the kernel stops at one that is out of range.
    if features.device.type == "cpu":
        count = int(live)
        if not 0 <= count <= len(rows):
            raise RuntimeError(f"live = {count}; expected 0 … {len(rows)}, the length of rows")
        if offset is not None and not 0 <= int(offset) <= len(out) - count:
            raise RuntimeError(
                f"offset = {int(offset)}; expected 0 … {len(out) - count}, where {count} rows fit into out"
            )
        outside = (rows[:count] < 0) | (rows[:count] >= len(features))
        if bool(outside.any()):
            i = int(outside.to(torch.uint8).argmax())
            raise RuntimeError(f"rows[{i}] = {int(rows[i])} is outside of features, which has {len(features)} rows")


namespace.impl("gather_survivors", reference, "CompositeExplicitAutograd")


def run_triton(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    from ..kernels import gather_survivors as kernel

    check(features, rows, live, out, offset)
    check_range_on_cuda(features, rows)
    kernel.run(features, rows, live, out, offset)


implement_on_cuda("gather_survivors", run_triton)


@torch.library.register_fake("eefast::gather_survivors")
def _fake(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    check_fake(features, ("rows", rows), ("live", live), ("out", out), ("offset", offset))
    check_traced(features, ("rows", rows, 1), ("live", live, 1), ("out", out, 4))


def run(features: Tensor, rows: Tensor, live: Tensor, out: Tensor, offset: Tensor | None = None) -> None:
    """`out[offset + i] = features[rows[i]]` for i < live.

    features: [M, C, H, W], any dtype; every row dense, contiguous or channels-last, with any distance between rows.
    rows: [R] int32; entries beyond `live` are not read.
    live: [1] int32, 0 … R.
    out: [R, C, H, W], with an `offset` any number of rows; dtype and layout of `features`; no other rows are written.
    offset: [1] int32, by default 0.

    Raises `RuntimeError` where a shape, dtype, layout or device does not fit, on the CPU also where an index is out of
    range.
    """
    torch.ops.eefast.gather_survivors.default(features, rows, live, out, offset)
