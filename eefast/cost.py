"""MACs of stages, heads and paths, counted by torch's FLOP counter on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


@dataclass(frozen=True)
class StageCost:
    """What one stage and its head cost for one sample, in MACs, and the shapes they hand on."""

    stage_macs: int
    head_macs: int
    feature_shape: tuple[int, ...]
    num_classes: int

    @property
    def num_features(self) -> int:
        """Channels that arrive at the head."""
        return self.feature_shape[0]


def macs(module: nn.Module, shape: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Multiply-accumulates of `module` for one sample and the shape that it hands on.

    module: maps [1, *shape] to a tensor (or to a tuple, whose first entry then gives the shape).
    shape: of one sample, without the batch dimension.
    Counted as EENets does, see `_counter`; torch counts a MAC as two FLOPs, which is undone here.
    """
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
    dtype = next((value.dtype for value in module.parameters()), torch.float32)
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad(), _counter() as counter:
            out = functional_call(module, meta, torch.empty(1, *shape, dtype=dtype, device="meta"))
    finally:
        for m in training:
            m.training = True
    out = out if isinstance(out, Tensor) else out[0]
    return counter.get_total_flops() // 2, tuple(out.shape[1:])


def _counter() -> Any:
    """Torch's FLOP counter with the formulas that EENets adds to convolutions and linear layers.

    EENets count a MAC per element of a ReLU, a pooling input or a convolution's bias, and two per element of an affine
    BatchNorm; its placements and published costs rest on that.
    """
    from torch.utils.flop_counter import FlopCounterMode, conv_flop_count  # here, since it imports triton

    def convolution(x: Any, weight: Any, bias: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return conv_flop_count(x, weight, out_shape, transposed=args[3]) + (2 * prod(out_shape) if bias else 0)

    def batch_norm(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(x) * (2 if weight else 1)

    def element_wise(x: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * prod(x)

    aten = torch.ops.aten
    formulas = {
        aten.convolution: convolution,
        aten.native_batch_norm: batch_norm,
        # Up to torch 2.11 the counter takes an op apart unless it knows this very overload.
        aten.native_batch_norm.default: batch_norm,
        aten.relu: element_wise,
        aten.relu_: element_wise,
        aten.mean: element_wise,
        aten.max_pool2d_with_indices: element_wise,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas)


def stage_costs(
    stages: Iterable[nn.Module], heads: Iterable[nn.Module], input_shape: Sequence[int]
) -> tuple[StageCost, ...]:
    """One `StageCost` per exit, the shapes carried from stage to stage."""
    shape: tuple[int, ...] = tuple(input_shape)
    costs = []
    for stage, head in zip(stages, heads, strict=True):
        stage_macs, shape = macs(stage, shape)
        head_macs, (num_classes,) = macs(head, shape)
        costs.append(StageCost(stage_macs, head_macs, shape, num_classes))
    return tuple(costs)


def path_costs(costs: Sequence[StageCost]) -> tuple[Tensor, Tensor]:
    """Cost of every exit, relative to the plain network: all stages and the final classifier, no exits.

    Returns two float32 tensors [n + 1]:
    cost: stages up to the exit plus that exit's own head; the final exit is 1.0 (EENets' definition).
    path_cost: the same plus every head that was met on the way, the final head included.
    """
    trunk, met, to_exit, on_path = 0, 0, [], []
    for c in costs:
        trunk, met = trunk + c.stage_macs, met + c.head_macs
        to_exit.append(trunk + c.head_macs)
        on_path.append(trunk + met)
    # The plain network ends in the same pooling and linear, without the confidence row.
    plain = to_exit[-1] = trunk + c.head_macs - c.num_features
    return torch.tensor(to_exit) / plain, torch.tensor(on_path) / plain
