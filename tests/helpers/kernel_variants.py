"""Every Triton kernel in every launch configuration, as launches of tensors without memory, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from eefast.kernels import exit_conv_head, exit_head, gather_survivors, indexed_conv
from eefast.kernels.launch import Launch
from torch import Tensor

from eefast.criteria import CRITERIA

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


Variant = tuple[str, Launch, frozenset[str]]


def variants() -> Iterator[Variant]:
    """Name, launch and what its machine code must show: "wide_loads" of 16 bytes, "tensor_cores"."""
    for shape in HEADS:
        yield from _exit_head(shape)
    for shape in ((10, 64, 8, 8), (1000, 2048, 7, 7)):
        # Of several launches, dtypes and layouts change the first one, and rules the last one.
        for dtype in (BFLOAT, SINGLE, DOUBLE):
            yield _exit_head(shape, dtype)[0]
        for criterion in list(CRITERIA)[1:]:
            yield _exit_head(shape, criterion=criterion)[-1]
        yield _exit_head(shape, layout=torch.contiguous_format)[0]
        yield _exit_head(shape, final=True)[-1]
        for criterion in ("learned", "entropy"):
            yield _exit_head(shape, criterion=criterion, of_each=True)[-1]
        yield _exit_head(shape, criterion="carried")[-1]
        yield _exit_head(shape, SINGLE, "carried", of_each=True)[-1]
    yield _exit_head((1000, 64, 56, 56), criterion="carried", final=True)[-1]
    yield _exit_head((8191, 64, 1, 1), criterion="carried")[-1]
    for shape in CONV_HEADS:
        yield from _exit_conv_head(shape)
    for dtype in (BFLOAT, SINGLE, DOUBLE):
        yield _exit_conv_head((10, 64, 8, 8), dtype)[0]
    yield _exit_conv_head((1000, 512, 7, 7), SINGLE)[0]
    yield _exit_conv_head((10, 64, 8, 8), criterion="margin")[0]
    yield _exit_conv_head((10, 64, 8, 8), of_each=True)[0]
    yield _exit_conv_head((10, 64, 8, 8), criterion="carried")[0]
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


def _entries(classes: int, channels: int, height: int) -> int:
    """Of the live list, as in bench/op_cases.py and with the networks of bench/workloads.py."""
    large = classes >= 1000 or (channels >= 64 and height >= 56)
    return 256 if large else 1024 if classes >= 200 else 4096


def _lists_and_results(entries: int, classes: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    lists = (*(_empty(entries, dtype=torch.int32) for _ in range(2)), _empty(1, dtype=torch.int32))
    results = _empty(entries, classes), _empty(entries), _empty(entries, dtype=torch.int64)
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


def _expected(wide: bool, dot: bool) -> frozenset[str]:
    return frozenset(["wide_loads"] * wide + ["tensor_cores"] * dot)


def _named(name: str, launches: Sequence[Launch], wide: bool, dot: bool) -> list[Variant]:
    """The launches of one op. The first reads the features; of three, the second has the product."""
    if len(launches) == 1:
        return [(name, launches[0], _expected(wide, dot))]
    pool, classify, decide = launches
    return [
        (f"{name}, pool", pool, _expected(wide, dot)),
        (f"{name}, classify", classify, frozenset({"tensor_cores"})),
        (f"{name}, decide", decide, frozenset()),
    ]


def _exit_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned",
    layout: torch.memory_format = torch.channels_last, final: bool = False, of_each: bool = False,
) -> list[Variant]:  # fmt: skip
    classes, channels, height, width = shape
    entries = _entries(classes, channels, height)
    features = _empty(entries, channels, height, width, dtype=dtype).contiguous(memory_format=layout)
    lists, results, next_lists = _lists_and_results(entries, classes)
    launches = exit_head.launches(
        features, _empty(classes + 1, channels), _empty(classes + 1),
        None if final else _empty(*[entries] * of_each),
        *lists, criterion, 1, *results, *next_lists, _rule(criterion),
    )  # fmt: skip
    lines = channels if layout == torch.channels_last else height * width
    # Of a map smaller than a tile has threads, every thread loads one element.
    wide = lines * dtype.itemsize % 16 == 0 and features[0].numel() > 64
    return _named(_name("exit_head", shape, dtype, criterion, layout, final, of_each), launches, wide, False)


def _exit_conv_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned", of_each: bool = False
) -> list[Variant]:
    classes, channels, height, width = shape
    entries = _entries(classes, channels, height)
    features = _empty(entries, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    lists, results, next_lists = _lists_and_results(entries, classes)
    launches = exit_conv_head.launches(
        features, _empty(channels, channels, 3, 3, dtype=dtype), _empty(channels), _empty(classes + 1, channels),
        _empty(classes + 1), _empty(*[entries] * of_each), *lists, criterion, 1, *results, *next_lists,
        _rule(criterion),
    )  # fmt: skip
    # With few channels or one pixel a weight tile has fewer elements than the block has threads.
    wide = channels % 16 == 0 and height * width > 1
    name = _name("exit_conv_head", shape, dtype, criterion, torch.channels_last, False, of_each)
    return _named(name, launches, wide, True)


def _gather_survivors(shape: tuple[int, ...], dtype: torch.dtype) -> Variant:
    entries = _entries(10, shape[0], shape[1])
    features, out = (_empty(entries, *shape, dtype=dtype) for _ in range(2))
    offset = _empty(1, dtype=torch.int32)
    launch = gather_survivors.launch(
        features, _empty(entries, dtype=torch.int32), _empty(1, dtype=torch.int32), out, offset
    )
    wide = {"wide_loads"} if shape[0] * shape[1] * shape[2] * dtype.itemsize % 16 == 0 else set()
    return _name("gather_survivors", shape, dtype, "learned", torch.channels_last, False), launch, frozenset(wide)


def _indexed_conv(
    shape: tuple[Any, ...], dtype: torch.dtype = HALF, rows: bool = True, relu: bool = True, in_order: bool = False
) -> Variant:
    in_channels, channels, height, width, kernel, stride, residual = shape
    # Those of ImageNet's networks have as many channels as pixels in a line, or more.
    entries = 256 if max(in_channels, channels) >= 128 else _entries(10, in_channels, height)
    features, weight, out = (
        _empty(*size, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for size in (
            (entries, in_channels, height, width),
            (channels, in_channels, kernel, kernel),
            (entries, channels, -(-height // stride), -(-width // stride)),
        )
    )
    launch = indexed_conv.launch(
        features, weight, _empty(channels), None if residual == "none" else out,
        _empty(entries, dtype=torch.int32) if rows else None, residual == "through", _empty(1, dtype=torch.int32),
        stride, relu, out, in_order,
    )  # fmt: skip
    name = f"indexed_conv {str(dtype).removeprefix('torch.')} {in_channels}-{channels}x{height}x{width} "
    name += f"{kernel}x{kernel}/{stride} residual {residual}{'' if rows else ' no rows'}{'' if relu else ' no ReLU'}"
    name += " features in order" * in_order
    # The weights of fewer taps · channels are fewer elements than the block has threads.
    wide = {"wide_loads"} if in_channels % 8 == 0 and channels % 8 == 0 and kernel**2 * in_channels > 16 else set()
    return name, launch, frozenset(wide | {"tensor_cores"})
