"""Lowered network → `ResidentProgram`: its steps as a table, its weights packed for the kernels."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engines.program import ResidentProgram
from ..ops import Kind
from . import weight_order
from .layers import IntegerLayer, Layer, Lowered

PackedWeights = dict[tuple[int, int], Tensor]
"""Packed weights by index of the layer and its algorithm, see `Layer.algorithm`."""


def program(
    lowered: Lowered, algorithms: tuple[int, ...], groups: tuple[int, ...], bfloat16: bool, known: PackedWeights
) -> ResidentProgram:
    """The program for the CPU, weights packed for the algorithm of their section or, of integers, of their layer.

    algorithms, groups: per section, see `ResidentProgram`. known: what was packed before with the same `bfloat16`;
    what is packed now is added.
    """
    winograd = [layer.algorithm(algorithms[layer.section]) for layer in lowered.layers]
    for i, (layer, side) in enumerate(zip(lowered.layers, winograd, strict=True)):
        if (i, side) not in known:
            known[i, side] = _packed(layer, side, bfloat16)
    packed = [known[key] for key in enumerate(winograd)]
    return ResidentProgram(
        _steps(lowered, winograd, packed),
        torch.tensor(lowered.maps, dtype=torch.int64),
        torch.tensor(groups, dtype=torch.int64),
        lowered.weights,
        _on_large_pages(packed),
        bfloat16,
        algorithms,
        groups,
        image=lowered.image,
    )


def cuda_program(lowered: Lowered, dtype: torch.dtype, device: torch.device) -> ResidentProgram:
    """The program for CUDA, weights packed in float16 or bfloat16; tables stay on the CPU."""
    packed = [_packed_for_cuda(layer, dtype) for layer in lowered.layers]
    sections = len(lowered.sizes)
    return ResidentProgram(
        _steps(lowered, [0] * len(packed), packed),
        torch.tensor(lowered.maps, dtype=torch.int64),
        torch.ones(sections, dtype=torch.int64),
        lowered.weights.to(device),
        torch.cat(packed).to(device),
        dtype == torch.bfloat16,
        (0,) * sections,
        (1,) * sections,
    )


def _steps(lowered: Lowered, winograd: Sequence[int], packed: Sequence[Tensor]) -> Tensor:
    """[S, 15] int64, the table that the op takes; the layers' weights are stored back to back."""
    rows, weight_at, packed_at = [], 0, 0
    for layer, side, vector in zip(lowered.layers, winograd, packed, strict=True):
        rows.append([
            layer.kind, layer.source, layer.target, layer.residual, layer.activation, layer.kernel, layer.stride,
            layer.padding, side, weight_at, packed_at, layer.section, layer.groups, layer.channel, int(layer.row),
        ])  # fmt: skip
        weight_at += sum(part.numel() for part in layer.parts)
        packed_at += len(vector)
    return torch.tensor(rows, dtype=torch.int64)


def _packed(layer: Layer, winograd: int, bfloat16: bool) -> Tensor:
    if isinstance(layer, IntegerLayer) and layer.kind == Kind.CONVOLUTION:
        weight, bias, scale, ratio = layer.parts
        packed = weight_order.int8_convolution(weight, bias, scale, ratio, winograd)
    elif layer.kind == Kind.CONVOLUTION and layer.groups > 1:
        inputs = layer.weight.shape[1] * layer.groups
        packed = weight_order.grouped(layer.weight, layer.bias, inputs, layer.groups, bfloat16)
    elif layer.kind == Kind.CONVOLUTION:
        packed = weight_order.convolution(layer.weight, layer.bias, winograd, layer.source == 0, bfloat16)
    elif layer.kind == Kind.AFFINE:
        packed = weight_order.affine(layer.weight, layer.bias)
    elif layer.kind == Kind.EXIT:
        packed = weight_order.exit_rows(layer.weight, layer.bias)
    else:
        return torch.empty(0)
    return _in_whole_lines(packed)


def _packed_for_cuda(layer: Layer, dtype: torch.dtype) -> Tensor:
    weight, bias = layer.weight.cpu(), layer.bias.cpu()
    if layer.kind == Kind.CONVOLUTION:
        image = layer.source == 0 and layer.kernel == 3 and weight.shape[1] <= 8
        packed = weight_order.fragments(weight, bias, image, dtype)
    elif layer.kind == Kind.AFFINE:
        packed = weight_order.affine(weight, bias)
    elif layer.kind == Kind.EXIT and weight.dim() == 2:
        packed = weight_order.class_rows(weight, bias)
    else:
        return torch.empty(0)  # the op refuses the step
    return _in_whole_lines(packed)


def _in_whole_lines(packed: Tensor) -> Tensor:
    """Filled up to whole cache lines, which is what kernels read."""
    missing = -len(packed) % weight_order.BLOCK
    return F.pad(packed, (0, missing)) if missing else packed


def _on_large_pages(parts: list[Tensor]) -> Tensor:
    """float32 vectors, one after the other in memory of 2 MiB pages, where the system has them.

    Megabytes of weights per image are too much for the processor's list of small pages, and small pages, scattered as
    they come, evict one another from its cache.
    """
    size = sum(part.nbytes for part in parts)
    if not hasattr(mmap, "MADV_HUGEPAGE") or size < 2**20:
        return torch.cat(parts)
    memory = mmap.mmap(-1, size)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.cat(parts, out=torch.frombuffer(memory, dtype=torch.float32))
