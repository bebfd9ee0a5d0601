"""Stages, heads → their MACs and the cost of every exit, counted by torch's FLOP formulas on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .modules.contexts import isolated, mode, same_randomness
from .modules.copies import special_kind, working_copy


@dataclass(frozen=True)
class StageCost:
    """What one stage and its head cost for one sample, in MACs; the stage's output shape (C, H, W)."""

    stage_macs: int
    head_macs: int
    feature_shape: tuple[int, ...]
    num_classes: int

    @property
    def num_features(self) -> int:
        """Number of channels that the head reads."""
        return self.feature_shape[0]


def macs(module: nn.Module, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Multiply-accumulates of `module` for one sample, and its output shape.

    module: maps [1, *shape] to a tensor (or to a tuple, whose first entry then gives the shape); a copy of it runs.
    shape: of one sample, without the batch dimension.
    Counted as EENets does, see `_Counter`; torch counts a MAC as two FLOPs, which is undone here.
    """
    dtype = next((value.dtype for value in module.parameters()), torch.float32)
    try:
        out, flops = _counted(module, shape, dtype)
    except Exception as error:
        special = next(filter(None, map(special_kind, module.parameters())), "")
        if special:
            raise ValueError(f"a parameter is a {special}; build the network of plain tensors first") from error
        raise
    out = out if isinstance(out, Tensor) else out[0]
    return flops // 2, tuple(out.shape[1:])


def _counted(module: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> tuple[Any, int]:
    try:
        return _run(working_copy(module, "meta"), torch.empty(1, *shape, dtype=dtype, device="meta"))
    except (RuntimeError, NotImplementedError):
        # A module that makes tensors on a fixed device, or reads values, does not run on the meta device.
        device = next((value.device for value in module.parameters()), torch.device("cpu"))
        return _run(working_copy(module), torch.zeros(1, *shape, dtype=dtype, device=device))


def _run(copied: nn.Module, x: Tensor) -> tuple[Any, int]:
    """What a copy returns in eval mode, and the FLOPs that it took."""
    with isolated(x.device), same_randomness(x.device), mode(copied, training=False), _Counter() as counter:
        return copied(x), counter.flops


class _Counter(TorchDispatchMode):
    """FLOPs of this thread by torch's formulas and those that EENets adds to convolutions and linear layers.

    EENets count a MAC per element of a ReLU, a pooling input or a convolution's bias, and two per element of an affine
    BatchNorm; its placements and published costs rest on that. Torch's counter hooks into all modules of the
    process, also those that other threads run.
    """

    def __init__(self) -> None:
        super().__init__()
        from torch.utils.flop_counter import flop_registry  # here, since it imports triton

        self.flops, self.formulas = 0, {**flop_registry, **_formulas()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self.formulas.get(getattr(func, "overloadpacket", None))
        if formula is None and isinstance(func, torch._ops.OpOverload) and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _formulas() -> dict[Any, Callable[..., int]]:
    from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

    def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
        flops = conv_flop_count([*x.shape], [*weight.shape], [*out_val.shape], transposed=args[3])
        return flops + (0 if bias is None else 2 * prod(out_val.shape))

    def batch_norm(x: Tensor, weight: Tensor | None, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(x.shape) * (1 if weight is None else 2)

    def element_wise(x: Tensor, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(x.shape)

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q.shape, k.shape, v.shape)

    def fused_attention(x: Tensor, width: int) -> int:
        n, tokens, _ = x.shape
        return 8 * n * tokens * width**2 + 4 * n * tokens**2 * width

    def multi_head(q: Tensor, k: Tensor, v: Tensor, width: int, *args: Any, **kwargs: Any) -> int:
        return fused_attention(q, width)

    def encoder_layer(x: Tensor, width: int, heads: int, *args: Any, **kwargs: Any) -> int:
        n, tokens, _ = x.shape
        hidden = args[11].shape[0]  # of linear1's weight
        relu = 0 if args[4] else 2 * n * tokens * hidden
        return fused_attention(x, width) + 4 * n * tokens * width * hidden + relu

    aten = torch.ops.aten
    per_element = (aten.relu, aten.relu_, aten.mean, aten.max_pool2d_with_indices)
    return {
        aten.convolution: convolution,
        aten.native_batch_norm: batch_norm,
        # What PyTorch runs on the CPU in eval mode, where the meta device gets the single products.
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._native_multi_head_attention: multi_head,
        aten._transformer_encoder_layer_fwd: encoder_layer,
        **dict.fromkeys(per_element, element_wise),
    }


def stage_costs(
    stages: Iterable[nn.Module], heads: Iterable[nn.Module], input_shape: Sequence[int]
) -> tuple[StageCost, ...]:
    """One `StageCost` per exit; each stage reads the shape that the one before returns."""
    shape: tuple[int, ...] = tuple(input_shape)
    costs = []
    for stage, head in zip(stages, heads, strict=True):
        stage_macs, shape = macs(stage, shape)
        head_macs, (num_classes,) = macs(head, shape)
        costs.append(StageCost(stage_macs, head_macs, shape, num_classes))
    return tuple(costs)


def merged(costs: Sequence[StageCost], left_out: Sequence[int]) -> tuple[StageCost, ...]:
    """The costs of the same network without some exits, whose stages then belong to the next exit's."""
    found, before = [], 0
    for i, c in enumerate(costs):
        before += c.stage_macs
        if i not in left_out:
            found.append(StageCost(before, c.head_macs, c.feature_shape, c.num_classes))
            before = 0
    return tuple(found)


def path_costs(costs: Sequence[StageCost]) -> tuple[Tensor, Tensor]:
    """Cost of every exit, relative to the plain network: all stages and the final classifier, no exits.

    Returns two float32 tensors [n + 1]:
    cost: stages up to the exit plus the head of that exit alone; the final exit is 1.0 (EENets' definition).
    path_cost: the same plus every head before it; the final head counts whole, with its confidence row.
    """
    stages, heads, to_exit, on_path = 0, 0, [], []
    for c in costs:
        stages, heads = stages + c.stage_macs, heads + c.head_macs
        to_exit.append(stages + c.head_macs)
        on_path.append(stages + heads)
    # The plain network ends in the same pooling and linear, without the confidence row.
    plain = to_exit[-1] = stages + c.head_macs - c.num_features
    counts = torch.tensor([to_exit, on_path], dtype=torch.float32, device="cpu")
    cost, path_cost = counts / plain
    return cost.clone(), path_cost.clone()
