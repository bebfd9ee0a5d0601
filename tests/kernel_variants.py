"""Every Triton kernel in every launch configuration, as launches of tensors without memory, to be compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from eefast.kernels import compact, exit_conv_head, exit_head
from eefast.kernels.launch import Launch
from torch import Tensor

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


def variants() -> Iterator[tuple[str, Launch, frozenset[str]]]:
    """Name, launch and what its machine code must show: "wide_loads" of 16 bytes, "tensor_cores"."""
    for shape in HEADS:
        yield _exit_head(shape)
    for shape in ((10, 64, 8, 8), (1000, 2048, 7, 7)):
        for dtype in (BFLOAT, SINGLE, DOUBLE):
            yield _exit_head(shape, dtype)
        for criterion in ("max_probability", "entropy", "margin"):
            yield _exit_head(shape, criterion=criterion)
        yield _exit_head(shape, layout=torch.contiguous_format)
        yield _exit_head(shape, final=True)
    for shape in CONV_HEADS:
        yield _exit_conv_head(shape)
    for dtype in (BFLOAT, SINGLE, DOUBLE):
        yield _exit_conv_head((10, 64, 8, 8), dtype)
    yield _exit_conv_head((1000, 512, 7, 7), SINGLE)
    yield _exit_conv_head((10, 64, 8, 8), criterion="margin")
    for shape in ((64, 8, 8), (256, 56, 56), (64, 1, 1), (3, 7, 5)):
        for dtype in (HALF, SINGLE):
            yield _compact(shape, dtype)


def _empty(*shape: int, dtype: torch.dtype = SINGLE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lists_and_results(classes: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    lists = (*(_empty(ENTRIES, dtype=torch.int32) for _ in range(2)), _empty(1, dtype=torch.int32))
    results = _empty(ENTRIES, classes), _empty(ENTRIES), _empty(ENTRIES, dtype=torch.int64)
    return lists, results, tuple(torch.empty_like(x) for x in lists)


def _name(
    op: str, shape: tuple[int, ...], dtype: torch.dtype, criterion: str, layout: torch.memory_format, final: bool
) -> str:
    marks = [str(dtype).removeprefix("torch."), "x".join(map(str, shape))]
    marks += [criterion] * (criterion != "learned") + ["NCHW"] * (layout == torch.contiguous_format)
    return " ".join([op, *marks, *["final"] * final])


def _exit_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned",
    layout: torch.memory_format = torch.channels_last, final: bool = False,
) -> tuple[str, Launch, frozenset[str]]:  # fmt: skip
    classes, channels, height, width = shape
    features = _empty(ENTRIES, channels, height, width, dtype=dtype).contiguous(memory_format=layout)
    lists, results, next_lists = _lists_and_results(classes)
    launch = exit_head.launch(
        features, _empty(classes + 1, channels), _empty(classes + 1), None if final else _empty(),
        *lists, criterion, 1, *results, *next_lists,
    )  # fmt: skip
    lines = channels if layout == torch.channels_last else height * width
    # Of a map smaller than a tile has threads, every thread loads one element.
    wide = {"wide_loads"} if lines * dtype.itemsize % 16 == 0 and features[0].numel() > 64 else set()
    dot = {"tensor_cores"} if "scratch" in launch.arguments else set()
    return _name("exit_head", shape, dtype, criterion, layout, final), launch, frozenset(wide | dot)


def _exit_conv_head(
    shape: tuple[int, ...], dtype: torch.dtype = HALF, criterion: str = "learned"
) -> tuple[str, Launch, frozenset[str]]:
    classes, channels, height, width = shape
    features = _empty(ENTRIES, channels, height, width, dtype=dtype).contiguous(memory_format=torch.channels_last)
    lists, results, next_lists = _lists_and_results(classes)
    launch = exit_conv_head.launch(
        features, _empty(channels, channels, 3, 3, dtype=dtype), _empty(channels), _empty(classes + 1, channels),
        _empty(classes + 1), _empty(), *lists, criterion, 1, *results, *next_lists,
    )  # fmt: skip
    # With few channels or one pixel a weight tile has fewer elements than the block has threads.
    wide = {"wide_loads"} if channels % 16 == 0 and height * width > 1 else set()
    name = _name("exit_conv_head", shape, dtype, criterion, torch.channels_last, False)
    return name, launch, frozenset(wide | {"tensor_cores"})


def _compact(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, Launch, frozenset[str]]:
    features, out = (_empty(ENTRIES, *shape, dtype=dtype) for _ in range(2))
    launch = compact.launch(features, _empty(ENTRIES, dtype=torch.int32), _empty(1, dtype=torch.int32), out)
    wide = {"wide_loads"} if shape[0] * shape[1] * shape[2] * dtype.itemsize % 16 == 0 else set()
    return _name("compact", shape, dtype, "learned", torch.channels_last, False), launch, frozenset(wide)
