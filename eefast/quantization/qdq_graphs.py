"""Stage and the names of its convolutions → the stage in simulated INT8, whose scales are not yet known."""

from __future__ import annotations

from collections.abc import Collection
from typing import cast

import torch
from torch import fx, nn

from ..modules.tracing import recompile
from ..ops import Activation
from ..planning.folding import fold_stage
from ..planning.inference_copies import plain_norms
from ..planning.patterns import activation_of, called, computes_as, is_identity
from ..qdq import QdqConvolution, QdqStage, QuantizeDequantize

ROUNDED = "rounded_"
"""With the name of a node after it: the module that rounds what the node returns."""

RELUS = (Activation.RELU, Activation.RELU6)
"""What libraries compute in one step with the convolution before it."""


def folded_graph(stage: nn.Module, path: str) -> fx.GraphModule:
    """The graph of a stage, BatchNorms folded, float32; `ValueError` where there is none. path: of the stage."""
    folded, note = fold_stage(plain_norms(stage), torch.float32)
    if not isinstance(folded, fx.GraphModule):
        raise ValueError(f"{path} cannot be quantised: {note}; replace the module, or keep the network in float32")
    return folded


def convolutions(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes that convolve maps and nothing else, by name."""
    return {
        node.name: node
        for node in graph.graph.nodes
        if node.op == "call_module"
        and computes_as(conv := called(graph, node), nn.Conv2d)
        and conv.padding_mode == "zeros"
        and len(node.args) == 1
        and not node.kwargs
    }


def rounded_values(graph: fx.GraphModule, convs: Collection[fx.Node]) -> list[fx.Node]:
    """The nodes whose values become integers: what the convolutions read, and what they or the ReLU after them return.

    Without integers on both sides ONNX Runtime computes a convolution in float32.
    """
    found = dict[fx.Node, None]()
    for node in graph.graph.nodes:
        if node in convs:
            found[cast(fx.Node, node.args[0])] = None
            found[result_of(graph, node)] = None
    return list(found)


def result_of(graph: fx.GraphModule, conv: fx.Node) -> fx.Node:
    """The convolution, or the ReLU that alone reads it."""
    node = conv
    while len(node.users) == 1:
        (node,) = node.users
        if activation_of(called(graph, node)) in RELUS:
            return node
        if not is_identity(called(graph, node)):
            break
    return conv


def qdq_stage(graph: fx.GraphModule, names: Collection[str], path: str) -> QdqStage:
    """graph: see `folded_graph`, which becomes the stage's. names: of the convolutions to be in INT8.

    `ValueError` where the graph has none of such a name; path: of the stage.
    """
    known = convolutions(graph)
    if unknown := sorted(set(names) - known.keys()):
        raise ValueError(f"{path} has no convolution {unknown[0]!r}, but {', '.join(known) or 'none'}")
    convs = [known[name] for name in names]
    values = rounded_values(graph, convs)
    for node in convs:
        target = f"int8_{node.name}"
        graph.add_submodule(target, QdqConvolution(graph.get_submodule(str(node.target))))  # type: ignore[arg-type]
        node.target = target
    for value in values:
        users = list(value.users)
        graph.add_submodule(ROUNDED + value.name, QuantizeDequantize())
        with graph.graph.inserting_after(value):
            rounded = graph.graph.call_module(ROUNDED + value.name, (value,))
        for user in users:
            user.replace_input_with(value, rounded)
    graph.delete_all_unused_submodules()
    recompile(graph)
    return QdqStage(graph)
