"""Stage → channels-last inference copy in one dtype: every BatchNorm that follows a convolution is folded into it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..modules.tracing import Tracer, attributes, graph_module, recompile
from ..qdq import QdqStage
from ..quantized import QuantizedStage
from .inference_copies import channels_last, inference_copy
from .patterns import computes_as

SIMULATED = "INT8 computed in float32 by PyTorch"
"""The note of stages that other libraries run in integers."""

_PAIRS = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))


def fold_stage(stage: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """An eval copy of `stage` in `dtype` and channels-last, every BatchNorm after a convolution folded into it.

    Returns the copy and what was done: "folded", or why the copy still computes its BatchNorms. Each call of a
    convolution is folded separately, so that modules that are called more than once, or have several names, stay right.
    A stage in INT8 has nothing to fold; one of integers takes features of any dtype.
    """
    stage = inference_copy(stage)
    if isinstance(stage, QdqStage):
        return stage.graph, SIMULATED
    if isinstance(stage, QuantizedStage):
        return stage, "INT8 by PyTorch"
    # A trained network's float16 weights are folded in float32 or more, so that folding adds one rounding and no more.
    stage = stage.to(torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        # In a Sequential, since torch.fx would trace the inside of a root that is one of PyTorch's layers.
        root = nn.Sequential(stage)
        graph = Tracer().trace(root)
        folded = graph_module(attributes(root, graph), graph)
        _fold(folded.eval())
        return channels_last(folded, dtype), "folded"
    except Exception as error:  # torch.fx raises whatever the traced code does
        what = f"not folded: torch.fx cannot trace it ({type(error).__name__})"
        return channels_last(stage, dtype), what


def _fold(module: fx.GraphModule) -> None:
    """Replace every convolution that only a BatchNorm reads by one that computes both."""
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target in ("view", "view_as") and not _is_dtype(node.args[1:]):
            node.target = node.target.replace("view", "reshape")  # channels-last maps cannot be viewed
        source = node.args[0] if node.op == "call_module" and len(node.args) == 1 and not node.kwargs else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        conv, norm = (module.get_submodule(str(n.target)) for n in (source, node))
        if any(computes_as(conv, c) and computes_as(norm, n) for c, n in _PAIRS) and has_statistics_for(conv, norm):
            name = f"folded_{source.name}"
            module.add_submodule(name, fold_pair(cast(nn.Conv2d, conv), cast(nn.BatchNorm2d, norm)))
            source.target = name
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    recompile(module)


def _is_dtype(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(a, torch.dtype) for a in arguments)


def has_statistics_for(conv: Any, norm: Any) -> bool:
    """Whether a BatchNorm has running statistics, without which it takes the batch's, for each of conv's channels."""
    return norm.running_var is not None and norm.running_mean is not None and len(norm.running_mean) == len(conv.weight)


def fold_pair(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A new convolution that computes both, in the dtype of `conv`."""
    scale, shift = affine(norm)
    weight = conv.weight.detach().double()
    bias = 0.0 if conv.bias is None else conv.bias.detach().double()
    kind: Any = next(c for c, _ in _PAIRS if isinstance(conv, c))
    made = kind(
        weight.shape[1] * conv.groups, len(weight), conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, padding_mode=conv.padding_mode, device="meta",
    )  # fmt: skip
    weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    made.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    made.bias = nn.Parameter((bias * scale + shift).to(conv.weight.dtype), requires_grad=False)
    return cast(nn.Conv2d, made.eval())


def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] float64 of a BatchNorm with running statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
    scale = scale if norm.weight is None else norm.weight.detach().double() * scale
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else norm.bias.detach().double() + shift
