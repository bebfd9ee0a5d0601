"""Every Triton kernel in every launch configuration, as launches of tensors without memory, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from eefast.kernels import exit_conv_head, exit_head, gather_survivors, indexed_conv
from eefast.kernels.launch import Launch
from torch import Tensor

from eefast.criteria import CRITERIA

ENTRIES = 4096
HALF, BFLOAT, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64

# (K, C, H, W): CIFAR and MNIST nets, ImageNet nets at 64 and 224 pixels, the edges of the range.
HEADS = (
    (10, 16, 32, 32), (10, 32, 16, 16), (10, 64, 8, 8), (100, 64, 8, 8), (10, 8, 7, 7), (10, 2, 28, 28),
    (200, 64, 16, 16), (200, 512, 2, 2), (1000, 64, 56, 56), (1000, 256, 56, 56), (1000, 512, 28, 28),
    (1000, 1024, 14, 14), (1000, 2048, 7, 7), (10, 2048, 7, 7), (10, 512, 7, 7), (63, 1024, 7, 7),
    (1, 8, 1, 1), (1, 4096, 7, 7), (8191, 64, 1, 1), (10, 16384, 1, 1), (1000, 2, 112, 112),
)  # fmt: skip
CONV_HEADS = (
    (10, 16, 32, 32), (10, 32, 16, 16), (10, 64, 8, 8), (200, 128, 8, 8), (1000, 256, 14, 14), (1000, 512, 7, 7),
    (1000, 64, 2, 2), (10, 256, 1, 1), (10, 8, 7, 7), (10, 2, 28, 28),
)  # fmt: skip
# (C_in, C_out, H, W, kernel, stride, residual): through the rows, in order, or none. As in ResNets for CIFAR and
# ImageNet; then channels that are no multiples of 16.
CONVS = (
    (16, 16, 32, 32, 3, 1, "through"), (32, 32, 16, 16, 3, 1, "in order"), (64, 64, 8, 8, 3, 1, "through"),
    (16, 32, 32, 32, 3, 2, "none"), (16, 32, 32, 32, 1, 2, "none"), (32, 64, 16, 16, 3, 2, "none"),
    (64, 64, 56, 56, 3, 1, "through"), (128, 128, 28, 28, 3, 1, "in order"), (256, 256, 14, 14, 3, 1, "through"),
    (512, 512, 7, 7, 3, 1, "through"), (64, 256, 56, 56, 1, 1, "through"), (1024, 256, 14, 14, 1, 1, "none"),
    (128, 128, 56, 56, 3, 2, "none"), (1024, 2048, 14, 14, 1, 2, "none"), (3, 16, 32, 32, 3, 1, "none"),
    (37, 200, 15, 13, 3, 1, "through"), (8, 8, 1, 1, 1, 1, "in order"),
)  # fmt: skip


def variants() -> Iterator[tuple[str, Launch, frozenset[str]]]:
    """Name, launch and what its machine code must show: "wide_loads" of 16 bytes, "tensor_cores"."""
    for shape in HEADS:
        yield _exit_head(shape)
    for shape in ((10, 64, 8, 8), (1000, 2048, 7, 7)):
        for dtype in (BFLOAT, SINGLE, DOUBLE):
            yield _exit_head(shape, dtype)
        for criterion in list(CRITERIA)[1:]:
            yield _exit_head(shape, criterion=criterion)
        yield _exit_head(shape, layout=torch.contiguous_format)
        yield _exit_head(shape, final=True)
        for criterion in ("learned", "entropy"):
            yield _exit_head(shape, criterion=criterion, of_each=True)
        yield _exit_head(shape, criterion="carried")
        yield _exit_head(shape, SINGLE, "carried", of_each=True)
    yield _exit_head((1000, 64, 56, 56), criterion="carried", final=True)
    for shape in CONV_HEADS:
        yield _exit_conv_head(shape)
    for dtype in (BFLOAT, SINGLE, DOUBLE):
        yield _exit_conv_head((10, 64, 8, 8), dtype)
    yield _exit_conv_head((1000, 512, 7, 7), SINGLE)
    yield _exit_conv_head((10, 64, 8, 8), criterion="margin")
    yield _exit_conv_head((10, 64, 8, 8), of_each=True)
    yield _exit_conv_head((10, 64, 8, 8), criterion="carried")
    yield _exit_conv_head((1000, 512, 7, 7), SINGLE, "carried")
    for shape in ((64, 8, 8), (256, 56, 56), (64, 1, 1), (3, 7, 5)):
        for dtype in (HALF, SINGLE):
            yield _gather_survivors(shape, dtype)
    for shape in CONVS:
        yield _indexed_conv(shape)
    for dtype in (BFLOAT, SINGLE):
        yield _indexed_conv(CONVS[2], dtype)
    yield _indexed_conv(CONVS[2], rows=False)
    for shape in (CONVS[2], CONVS[10]):
        yield _indexed_conv(shape, in_order=True)
    yield _indexed_conv(CONVS[3], relu=False)


def _empty(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lists_and_results(classes: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    lists = (*(_empty(ENTRIES, dtype=torch.int32) for _ in range(2)), _empty(1, dtype=torch.int32))
    results = _empty(ENTRIES, classes), _empty(ENTRIES), _empty(ENTRIES, dtype=torch.int64)
    return lists, results, tuple(torch.empty_like(x) for x in lists)


def _rule(criterion: str) -> Tensor | None:
    return _empty(9) if criterion == "carried" else None


def _name(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, criterion: str, layout: torch.memory_format, final: bool,
    of_each: bool = False,
) -> str:  # fmt: skip
    marks = [str(dtype).removeprefix("torch."), "x".join(map(str, shape))]
    marks += [criterion] * (criterion != "learned") + ["NCHW"] * (layout == torch.contiguous_format)
    return " ".join([op, *marks, *["final"] * final, *["thresholds"] * of_each])


def _exit_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned",
    layout: torch.memory_format = torch.channels_last, final: bool = False, of_each: bool = False,
) -> tuple[str, Launch, frozenset[str]]:  # fmt: skip
    classes, channels, height, width = shape
    features = _empty(ENTRIES, channels, height, width, dtype=dtype).contiguous(memory_format=layout)
    lists, results, next_lists = _lists_and_results(classes)
    launch = exit_head.launch(
        features, _empty(classes + 1, channels), _empty(classes + 1),
        None if final else _empty(*[ENTRIES] * of_each),
        *lists, criterion, 1, *results, *next_lists, _rule(criterion),
    )  # fmt: skip
    lines = channels if layout == torch.channels_last else height * width
    # Of a map smaller than a tile has threads, every thread loads one element.
    wide = {"wide_loads"} if lines * dtype.itemsize % 16 == 0 and features[0].numel() > 64 else set()
    dot = {"tensor_cores"} if "scratch" in launch.arguments else set()
    return _name("exit_head", shape, dtype, criterion, layout, final, of_each), launch, frozenset(wide | dot)


def _exit_conv_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned", of_each: bool = False
) -> tuple[str, Launch, frozenset[str]]:
    classes, channels, height, width = shape
    features = _empty(ENTRIES, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    lists, results, next_lists = _lists_and_results(classes)
    launch = exit_conv_head.launch(
        features, _empty(channels, channels, 3, 3, dtype=dtype), _empty(channels), _empty(classes + 1, channels),
        _empty(classes + 1), _empty(*[ENTRIES] * of_each), *lists, criterion, 1, *results, *next_lists,
        _rule(criterion),
    )  # fmt: skip
    # With few channels or one pixel a weight tile has fewer elements than the block has threads.
    wide = {"wide_loads"} if channels % 16 == 0 and height * width > 1 else set()
    name = _name("exit_conv_head", shape, dtype, criterion, torch.channels_last, False, of_each)
    return name, launch, frozenset(wide | {"tensor_cores"})


def _gather_survivors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, Launch, frozenset[str]]:
    features, out = (_empty(ENTRIES, *shape, dtype=dtype) for _ in range(2))
    offset = _empty(1, dtype=torch.int32)
    launch = gather_survivors.launch(
        features, _empty(ENTRIES, dtype=torch.int32), _empty(1, dtype=torch.int32), out, offset
    )
    wide = {"wide_loads"} if shape[0] * shape[1] * shape[2] * dtype.itemsize % 16 == 0 else set()
    return _name("gather_survivors", shape, dtype, "learned", torch.channels_last, False), launch, frozenset(wide)


def _indexed_conv(
    shape: tuple[Any, ...], dtype: torch.dtype = HALF, rows: bool = True, relu: bool = True, in_order: bool = False
) -> tuple[str, Launch, frozenset[str]]:
    in_channels, channels, height, width, kernel, stride, residual = shape
    features, weight, out = (
        _empty(*size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in (
            (ENTRIES, in_channels, height, width),
            (channels, in_channels, kernel, kernel),
            (ENTRIES, channels, -(-height // stride), -(-width // stride)),
        )
    )
    launch = indexed_conv.launch(
        features, weight, _empty(channels), None if residual == "none" else out,
        _empty(ENTRIES, dtype=torch.int32) if rows else None, residual == "through", _empty(1, dtype=torch.int32),
        stride, relu, out, in_order,
    )  # fmt: skip
    name = f"indexed_conv {str(dtype).removeprefix('torch.')} {in_channels}-{channels}x{height}x{width} "
    name += f"{kernel}x{kernel}/{stride} residual {residual}{'' if rows else ' no rows'}{'' if relu else ' no ReLU'}"
    name += " features in order" * in_order
    # The weights of fewer taps · channels are fewer elements than the block has threads.
    wide = {"wide_loads"} if in_channels % 8 == 0 and channels % 8 == 0 and kernel**2 * in_channels > 16 else set()
    return name, launch, frozenset(wide | {"tensor_cores"})
