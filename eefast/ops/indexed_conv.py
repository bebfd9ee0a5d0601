"""A convolution with bias, residual and ReLU that reads its samples through the survivor list."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_fake, check_range_on_cuda, check_stored, check_traced, refuse_gradient
from .library import define, namespace
from .on_cuda import implement_on_cuda

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

define(
    "indexed_conv(Tensor features, Tensor weight, Tensor bias, Tensor? residual, Tensor? rows,"
    " bool residual_through_rows, Tensor live, int stride, bool relu, bool features_in_order=False) -> Tensor"
)


def reference(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, features_in_order: bool = False,
) -> Tensor:  # fmt: skip
    """`indexed_conv` in plain PyTorch: its oracle, its fallback and its documentation."""
    check(features, weight, bias, residual, rows, residual_through_rows, live, stride, features_in_order)
    out = empty_output(features, weight, rows, stride).zero_()
    count = min(int(live), len(out))
    chosen = slice(count) if rows is None else rows[:count]
    seen = features[slice(count) if features_in_order else chosen]
    sums = F.conv2d(seen.float(), weight.float(), bias, stride, padding=weight.shape[-1] // 2)
    if residual is not None:
        sums += residual[chosen if residual_through_rows else slice(count)].float()
    out[:count] = F.relu(sums) if relu else sums
    return out


def empty_output(features: Tensor, weight: Tensor, rows: Tensor | None, stride: int) -> Tensor:
    height, width = (-(-n // stride) for n in features.shape[2:])
    shape = ((features if rows is None else rows).shape[0], weight.shape[0], height, width)
    return torch.empty(shape, dtype=features.dtype, device=features.device, memory_format=torch.channels_last)


def check(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, features_in_order: bool = False,
) -> None:  # fmt: skip
    """`RuntimeError` unless the arguments fit."""
    given = (("weight", weight), ("bias", bias), ("residual", residual), ("rows", rows), ("live", live))
    check_stored(("features", features), *given, optional=["residual", "rows"])
    if features.dim() != 4 or 0 in features.shape[1:]:
        raise RuntimeError(
            f"features has shape {list(features.shape)}; expected [M, C_in, H, W] with at least one channel and one "
            "pixel"
        )
    if features.dtype not in DTYPES:
        raise RuntimeError(f"features is {features.dtype}; convert it to one of {', '.join(map(str, DTYPES))}")
    size, channels = len(features) if rows is None else rows.numel(), features.shape[1]
    if features_in_order and len(features) < size:
        raise RuntimeError(f"features has {len(features)} rows; expected at least {size}, as rows has entries")
    if weight.dim() != 4 or 0 in weight.shape or list(weight.shape[1:]) not in ([channels, k, k] for k in (1, 3)):
        raise RuntimeError(
            f"weight has shape {list(weight.shape)}; expected [C_out, {channels}, 1, 1] or [C_out, {channels}, 3, 3], "
            f"where {channels} are the channels of features"
        )
    if list(bias.shape) != list(weight.shape[:1]) or bias.dtype != torch.float32:
        raise RuntimeError(
            f"bias is {bias.dtype} of shape {list(bias.shape)}; expected torch.float32 of shape "
            f"{list(weight.shape[:1])}"
        )
    if stride not in (1, 2):
        raise RuntimeError(f"stride = {stride}; expected 1 or 2")
    for name, tensor, shape in (("rows", rows, [size]), ("live", live, [1])):
        if tensor is not None and tensor.dtype != torch.int32:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to(torch.int32)")
        if tensor is not None and list(tensor.shape) != shape:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {shape}")
    through_rows = rows is not None and residual_through_rows
    if residual is not None:
        shape = [len(weight), *(-(-n // stride) for n in features.shape[2:])]
        least = 0 if through_rows else size
        if list(residual.shape[1:]) != shape or len(residual) < least:
            raise RuntimeError(
                f"residual has shape {list(residual.shape)}; expected [*, {', '.join(map(str, shape))}] with at least "
                f"{least} rows"
            )
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and tensor.dtype != features.dtype:
            raise RuntimeError(f"{name} is {tensor.dtype}; convert it with .to({features.dtype}), as features")
    for name, tensor in given:
        if tensor is not None and tensor.device != features.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {features.device}, where features is")
    for name, tensor in (("features", features), ("weight", weight), ("residual", residual)):
        if tensor is not None and not tensor.is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError(
                f"{name} has strides {tensor.stride()}; make it channels-last with "
                ".contiguous(memory_format=torch.channels_last)"
            )
    # On a GPU reading the indices would wait for the device; there the kernel stops at one that is out of range.
    if features.device.type == "cpu":
        _check_indices(None if features_in_order else features, residual if through_rows else None, rows, live)


def _check_indices(features: Tensor | None, residual: Tensor | None, rows: Tensor | None, live: Tensor) -> None:
    count = int(live)
    if count < 0:
        raise RuntimeError(f"live = {count}; expected a number of rows, 0 or more")
    if rows is None:
        return
    for name, tensor in (("features", features), ("residual", residual)):
        if tensor is None:
            continue
        outside = (rows[:count] < 0) | (rows[:count] >= len(tensor))
        if bool(outside.any()):
            i = int(outside.to(torch.uint8).argmax())
            raise RuntimeError(f"rows[{i}] = {int(rows[i])} is outside of {name}, which has {len(tensor)} rows")


namespace.impl("indexed_conv", reference, "CompositeExplicitAutograd")


def run_triton(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, features_in_order: bool = False,
) -> Tensor:  # fmt: skip
    from ..kernels import indexed_conv as kernel

    check(features, weight, bias, residual, rows, residual_through_rows, live, stride, features_in_order)
    check_range_on_cuda(features, features if rows is None else rows, ("weight", weight))
    out = empty_output(features, weight, rows, stride)
    if out.shape[1:].numel() >= 2**31:
        raise RuntimeError(
            f"weight has {len(weight)} filters, which makes {list(out.shape[1:])} of a sample; on CUDA a sample has "
            "fewer than 2³¹ elements"
        )
    given = features, weight, bias, residual, rows, residual_through_rows, live, stride, relu, out
    kernel.run(*given, features_in_order)
    return out


implement_on_cuda("indexed_conv", run_triton)


@torch.library.register_fake("eefast::indexed_conv")
def _fake(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, features_in_order: bool = False,
) -> Tensor:  # fmt: skip
    check_fake(features, ("weight", weight), ("bias", bias), ("residual", residual), ("rows", rows), ("live", live))
    check_traced(features, ("weight", weight, 4), ("bias", bias, 1), ("live", live, 1), weight=("weight", weight))
    return empty_output(features, weight, rows, stride)


def flops(
    features: Any, weight: Any, bias: Any, residual: Any, rows: Any, residual_through_rows: bool, live: Any,
    stride: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """For torch's FLOP counter, from the shapes: the convolution's, for all entries, live or not."""
    entries = features[0] if rows is None else rows[0]
    pixels = -(-features[2] // stride) * -(-features[3] // stride)
    return 2 * entries * pixels * weight[0] * weight[1] * weight[2] * weight[3]


def run(
    features: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
    residual_through_rows: bool, live: Tensor, stride: int, relu: bool, features_in_order: bool = False,
) -> Tensor:  # fmt: skip
    """`out[i] = act(conv2d(features[r(i)], weight, stride, padding=k // 2) + bias + residual[q(i)])` for i < live.

    r(i) = rows[i] where `rows` is given, else i; q(i) = rows[i] where `rows` is given and `residual_through_rows` is
    set, else i; act = ReLU where `relu` is set, else nothing. One launch on GPUs; the host never reads `live` there.

    features: [M, C_in, H, W] float16, bfloat16 or float32, channels-last. Rows that no live entry names are not read.
    weight: [C_out, C_in, k, k], k 1 or 3, in the dtype of `features`, channels-last. bias: [C_out] float32.
    residual: [*, C_out, H', W'] in the dtype of `features`, channels-last, or None.
    rows: [R] int32, or None for the rows of `features` in their order, R = M; entries beyond `live` are not read.
    live: [1] int32, 0 or more; above R it counts as R.
    stride: 1 or 2.
    features_in_order: row i is the result for features[i], M ≥ R; only the residual is read through the rows.

    Returns [R, C_out, H', W'], H' = ⌈H / stride⌉, dtype of `features`, channels-last. Rows beyond `live` are not
    written: they hold what the memory held on GPUs, zeros on the CPU.

    Products in the dtype of `features`, sums, bias, residual and ReLU in float32, rounded once at the end.

    Raises `RuntimeError` where a shape, dtype, layout or device does not fit, on the CPU also where an index is out of
    range; `ValueError` where `features` requires grad.
    """
    refuse_gradient("features", features, "indexed_conv")
    return torch.ops.eefast.indexed_conv.default(
        features, weight, bias, residual, rows, residual_through_rows, live, stride, relu, features_in_order
    )
