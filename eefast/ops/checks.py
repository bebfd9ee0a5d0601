"""Checks that the ops share: a tensor argument that does not fit raises an error that names it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Named = tuple[str, Tensor | None]


def refuse_gradient(name: str, tensor: Tensor, op: str) -> None:
    """`ValueError` where a gradient would be needed, which the ops do not have."""
    if isinstance(tensor, Tensor) and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but {op} has no gradient; call it under torch.no_grad()")


def check_stored(*given: Named, optional: Sequence[str] = ()) -> None:
    """`RuntimeError` where a tensor's elements are not all in memory: sparse ones, those of a freed storage, None."""
    for name, tensor in given:
        if tensor is None:
            if name in optional:
                continue
            raise RuntimeError(f"{name} is None; expected a tensor")
        if tensor.layout != torch.strided:
            raise RuntimeError(f"{name} has the layout {tensor.layout}; convert it with .to_dense()")
        stored = tensor.untyped_storage().nbytes()
        if stored < tensor.nbytes or stored == 0:
            needed = (tensor.storage_offset() + _reach(tensor.shape, tensor.stride())) * tensor.element_size()
            if tensor.numel() and needed > stored:
                raise RuntimeError(
                    f"{name} needs {needed} bytes of its storage, which has {stored}; it has been freed or resized"
                )


def check_rule(criterion: str, rule: Tensor | None, shape: Sequence[int], device: torch.device) -> None:
    """`RuntimeError` unless a rule is given where the criterion is "carried", and only there."""
    if (criterion == "carried") != (rule is not None):
        given = "None" if rule is None else "given"
        raise RuntimeError(f"rule is {given} with criterion {criterion!r}; give it with 'carried', and only then")
    if rule is None:
        return
    check_stored(("rule", rule))
    if rule.dtype != torch.float32:
        raise RuntimeError(f"rule is {rule.dtype}; convert it with .to(torch.float32)")
    if list(rule.shape) != list(shape):
        raise RuntimeError(f"rule has shape {list(rule.shape)}; expected {list(shape)}")
    if rule.device != device:
        raise RuntimeError(f"rule is on {rule.device}; move it to {device}, where features is")


def check_written(name: str, tensor: Tensor) -> None:
    """`RuntimeError` where two elements of a tensor that gets written share memory."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} requires grad, but is written without one; give it as .detach()")
    if tensor.numel() == 0:
        return
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            raise RuntimeError(f"{name} has overlapping strides {list(tensor.stride())}; give it separate memory")
        reach += stride * (size - 1)


def check_apart(written: Iterable[Named], read: Iterable[Named]) -> None:
    """`RuntimeError` where what is written shares memory with what is read, or with what else is written."""
    written = list(written)
    given = [(name, tensor, *_span(tensor)) for name, tensor in (*written, *read) if tensor is not None]
    for i, (name, tensor, begin, end) in enumerate(given[: len(written)]):
        for other_name, other, other_begin, other_end in given[i + 1 :]:
            if max(begin, other_begin) < min(end, other_end) and not _beside(tensor, begin, other, other_begin):
                raise RuntimeError(f"{name} shares memory with {other_name}; give it separate memory")


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first element and after the last one."""
    begin = tensor.data_ptr()
    return begin, begin + _reach(tensor.shape, tensor.stride()) * tensor.element_size() if tensor.numel() else begin


def _reach(shape: Sequence[int], strides: Sequence[int]) -> int:
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1


def _beside(a: Tensor, a_begin: int, b: Tensor, b_begin: int) -> bool:
    """Whether rows of one size apart take turns in memory, as columns of one table do."""
    if a.dim() == 0 or b.dim() == 0 or len(a) < 2 or len(b) < 2:
        return False
    pitch, other_pitch = (x.stride(0) * x.element_size() for x in (a, b))
    row, other_row = (_reach(x.shape[1:], x.stride()[1:]) * x.element_size() for x in (a, b))
    after = (b_begin - a_begin) % pitch if pitch else 0
    return 0 < pitch == other_pitch and after >= row and after + other_row <= pitch


def check_fake(owner: Tensor | None, *given: Named) -> None:
    """`RuntimeError` for tensors of several devices: with one on "meta" the op would do nothing and say nothing."""
    for name, tensor in given:
        if owner is None:
            raise RuntimeError(f"{name} is given, but None in the place of the first tensor; expected one")
        if tensor is not None and tensor.device != owner.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {owner.device}, where the others are")


def check_traced(features: Tensor, *given: tuple[str, Tensor, int], weight: tuple[str, Tensor] | None = None) -> None:
    """`RuntimeError` already while a call is traced: where `features`, with 4, or a given tensor has another number of
    dimensions, or where a weight [outputs, inputs, …] has other inputs than the channels of `features`.
    """
    for name, tensor, dimensions in (("features", features, 4), *given):
        if tensor.dim() != dimensions:
            raise RuntimeError(f"{name} has shape {list(tensor.shape)}; expected {dimensions} dimensions")
    if weight is not None:
        name, tensor = weight
        torch._check(
            tensor.shape[1] == features.shape[1],
            lambda: f"{name} has shape {list(tensor.shape)}; expected {features.shape[1]} inputs, as features",
        )


def check_range_on_cuda(features: Tensor, rows: Tensor, *weights: tuple[str, Tensor]) -> None:
    """`RuntimeError` where the Triton kernels would count beyond 32 bits."""
    if features.shape[1:].numel() >= 2**31:
        raise RuntimeError(f"features has shape {list(features.shape)}, on CUDA a sample has fewer than 2³¹ elements")
    if len(rows) >= 2**29:
        raise RuntimeError(f"rows has {len(rows)} entries, on CUDA fewer than 2²⁹ at a time; split the batch")
    for name, tensor in weights:
        if tensor.numel() >= 2**31:
            raise RuntimeError(f"{name} has {tensor.numel()} elements, on CUDA fewer than 2³¹; use engine='reference'")
