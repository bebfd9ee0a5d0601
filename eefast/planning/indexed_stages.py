"""Fused stage → the same for survivors: it reads rows of a larger batch, whose number is read on the device."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, fx, nn

from .. import ops
from ..modules.tracing import graph_module, recompile
from .folding import fold_stage
from .fusing import FusedConv, fuse_convolutions
from .patterns import called, describe


class IndexedStage(nn.Module):
    """A stage that reads the survivors in its input without a gathered copy; `indexed_stage` makes it.

    forward: features [M, C, H, W], channels-last, rows [R] int32, live [1] int32 → [R, C', H', W'], whose rows i < live
    are the stage's results for features[rows[i]]; the rows from `live` on are not defined. Without `rows`, row i is
    the result for features[i]. See `ops.indexed_conv`, also for the errors raised.
    """

    def __init__(self, stage: fx.GraphModule) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, features: Tensor, rows: Tensor | None, live: Tensor) -> Tensor:
        return self.stage(features, rows, live)


class _IndexedConv(nn.Module):
    """A `FusedConv` whose input, and residual, may be rows of a larger batch."""

    def __init__(self, conv: FusedConv) -> None:
        super().__init__()
        self.weight, self.stride, self.relu = conv.weight, conv.stride[0], conv.relu
        bias = torch.zeros(len(conv.weight), device=conv.weight.device) if conv.bias is None else conv.bias.float()
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(
        self, x: Tensor, residual: Tensor | None, rows: Tensor | None, residual_through_rows: bool, live: Tensor,
        in_order: bool = False,
    ) -> Tensor:  # fmt: skip
        given = x, self.weight, self.bias, residual, rows, residual_through_rows, live, self.stride, self.relu
        return ops.indexed_conv.run(*given, in_order)


def indexed_stage(module: nn.Module) -> tuple[IndexedStage | None, str]:
    """The stage that `fuse_convolutions` made, reading its input through an index; or None and the obstacle.

    module: is not changed and shares its weights with the indexed stage; biases become float32.
    Convolutions of the input, and its additions to their results, read it through the rows; all later maps hold the
    survivors alone. An input that is added to a later map is gathered first, since the op reads a residual through
    the rows only where it reads its features so.
    """
    obstacle = _indexing_obstacle(module)
    if obstacle:
        return None, f"{obstacle}; gather the survivors with eefast.ops.gather_survivors and run the stage on them"
    assert isinstance(module, fx.GraphModule)
    indexed = graph_module(module, copy.deepcopy(module.graph))
    graph = indexed.graph
    (features,) = graph.find_nodes(op="placeholder")
    convs = [(node, *node.args, None)[:3] for node in graph.find_nodes(op="call_module")]
    with graph.inserting_after(features):
        rows = graph.placeholder("rows")
    with graph.inserting_after(rows):
        live = graph.placeholder("live")
    if any(residual is features and source is not features for _, source, residual in convs):
        with graph.inserting_after(live):
            gathered = graph.call_function(_gathered, (features, rows, live))
        features.replace_all_uses_with(gathered, lambda user: user is not gathered)
    for node, *_ in convs:
        source, residual = (*node.args, None)[:2]
        indexed.add_submodule(cast(str, node.target), _IndexedConv(called(indexed, node)))
        node.args = (source, residual, rows if source is features else None, residual is features, live)
    recompile(indexed)
    return IndexedStage(indexed), ""


def device_counted(stage: nn.Module, dtype: torch.dtype) -> IndexedStage | None:
    """An inference copy of `stage` that reads the number of its rows on the device; None where that is impossible."""
    fused, _, _ = fuse_convolutions(fold_stage(stage, dtype)[0])
    return indexed_stage(fused)[0]


def reading_through_rows(module: nn.Module) -> IndexedStage | None:
    """The stage that `fuse_convolutions` made, whose convolutions and additions of its input read it through the rows.

    All else stays as it is and computes every entry, live or not. None where anything else than a convolution reads the
    input, or one that the op cannot compute. Shares its weights with `module`, which is not changed.
    """
    if not isinstance(module, fx.GraphModule) or len(module.graph.find_nodes(op="placeholder")) != 1:
        return None
    reading = graph_module(module, copy.deepcopy(module.graph))
    graph = reading.graph
    (features,) = graph.find_nodes(op="placeholder")
    for node in features.users:
        layer = called(reading, node)
        if not isinstance(layer, FusedConv) or _geometry_obstacle(layer):
            return None
    with graph.inserting_after(features):
        rows = graph.placeholder("rows")
    with graph.inserting_after(rows):
        live = graph.placeholder("live")
    for node in list(features.users):
        source, residual = (*node.args, None)[:2]
        name = f"{node.target}_through_rows"
        reading.add_submodule(name, _IndexedConv(called(reading, node)))
        node.target = name
        node.args = (source, residual, rows, residual is features, live, source is not features)
    recompile(reading)
    return IndexedStage(reading)


def _gathered(features: Tensor, rows: Tensor | None, live: Tensor) -> Tensor:
    if rows is None:
        return features
    out = torch.empty(
        (len(rows), *features.shape[1:]),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last,
    )
    ops.gather_survivors.run(features, rows, live, out)
    return out


def _indexing_obstacle(module: nn.Module) -> str:
    """What of a stage the indexed convolution cannot compute, "" where it can compute all."""
    if not isinstance(module, fx.GraphModule):
        return f"torch.fx cannot trace the stage, {type(module).__name__}"
    if len(module.graph.find_nodes(op="placeholder")) != 1:
        return "the stage takes more than its features"
    for node in module.graph.nodes:
        layer = called(module, node)
        if node.op == "output":
            result = node.args[0]
            if not (isinstance(result, fx.Node) and isinstance(called(module, result), FusedConv)):
                return f"the stage returns {result}, which is not the result of one of its convolutions"
        elif isinstance(layer, FusedConv):
            if obstacle := _geometry_obstacle(layer):
                return f"{node.name} is {obstacle}"
        elif node.op != "placeholder":
            what = describe(module, node)
            return f"the stage has {node.name} = {what}, which the indexed convolution cannot compute"
    return ""


def _geometry_obstacle(conv: FusedConv) -> str:
    kernel = tuple(conv.weight.shape[2:])
    plain = conv.padding == (kernel[0] // 2,) * 2 and conv.dilation == (1, 1) and conv.groups == 1
    if kernel in ((1, 1), (3, 3)) and conv.stride in ((1, 1), (2, 2)) and plain:
        return ""
    return (
        f"a convolution with kernel {kernel}, stride {conv.stride}, padding {conv.padding}, dilation {conv.dilation} "
        f"and {conv.groups} groups; indexed ones have a kernel of 1 or 3, stride 1 or 2, padding kernel // 2, no "
        "dilation and one group"
    )
