"""A backbone → its graph, whose nodes are modules and the operations between them; whole modules where no cut goes."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..modules.contexts import mode
from ..modules.copies import working_copy
from ..modules.tracing import Tracer, attributes, graph_module
from .calls import Call, run, watch

TRAINING = "training_mode"


class _TrainingMode(nn.Module):
    """Returns at run time what the traced code read as `self.training`."""

    def forward(self) -> bool:
        return self.training


class _CoarseTracer(Tracer):
    """Looks only into modules that a cut goes through; all others stay whole, with their names, hooks and flags."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__()
        self.opened, self.returned = opened, dict[str, fx.Node]()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.returned[self.path_of_module(m)] = out.node
        return out


@dataclass(frozen=True)
class Trace:
    """The backbone as nodes in the order in which they run.

    returned: by name of a module, the node that it returns. values: what nodes return for the two images. batch_size:
    the node that is their number.
    """

    backbone: nn.Module
    nodes: tuple[fx.Node, ...]
    returned: dict[str, fx.Node]
    values: dict[fx.Node, Any]
    batch_size: fx.Node

    def position(self, node: fx.Node) -> int:
        return self.nodes.index(node)

    def between(self, source: fx.Node, result: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes after `source`, up to and including `result`."""
        return self.nodes[self.position(source) + 1 : self.position(result) + 1]

    def also_needed(self, cut: fx.Node) -> list[fx.Node]:
        """Values from before `cut` that are used after it; parameters and the batch size are available everywhere."""
        here = self.position(cut)
        later = set(self.nodes[here + 1 :])
        before = (node for node in self.nodes[:here] if node.op != "get_attr" and node is not self.batch_size)
        return [node for node in before if later & node.users.keys()]

    def is_map(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return isinstance(value, Tensor) and value.dim() == self.values[self.nodes[0]].dim()


def traced(backbone: nn.Module, calls: Sequence[Call], inputs: Sequence[Tensor], names: Sequence[str]) -> Trace:
    """Traced by torch.fx, or followed from module to module where that is impossible; it ends with the last of `names`.

    inputs: batches of different sizes; the backbone was called with the first.
    """
    opened = {"", *(parent for name in names for parent in accumulate(name.split(".")[:-1], "{}.{}".format))}
    try:
        (trained, _), (graph, returned) = (_symbolic(backbone, opened, training) for training in (True, False))
    except Exception as error:  # torch.fx raises whatever the traced code does
        try:
            # A copy, since in training mode the statistics change.
            (trained, _) = _chain(watch(working_copy(backbone), inputs[0], training=True), opened)
            (graph, returned) = _chain(calls, opened)
        except ValueError as why:
            raise ValueError(
                f"the backbone cannot be cut: torch.fx cannot trace it ({error}), and its modules do not run one "
                f"after another ({why}); make it an nn.Sequential or build eefast.EarlyExitNet(stages, heads, ...)"
            ) from error
    _follow_training_flag(trained, graph)
    copies: dict[fx.Node, fx.Node] = {}
    whole = fx.Graph()
    whole.graph_copy(graph, copies)
    whole.output(tuple(copies.values()))
    runnable = module_of(backbone, whole)
    values = dict(zip(copies, run(runnable, inputs[0].clone()), strict=True))
    sizes = {node for node, value in values.items() if isinstance(value, int) and _is_first_size(node)}
    for x in inputs:
        found = zip(copies, run(runnable, x.clone()), strict=True) if sizes else ()
        sizes -= {node for node, value in found if not isinstance(value, int) or value != len(x)}
    batch_size = _shared_batch_size(graph, sizes)
    nodes = list(graph.nodes)
    nodes = nodes[: nodes.index(returned[names[-1]]) + 1]
    return Trace(backbone, tuple(nodes), returned, values, batch_size)


def _is_first_size(node: fx.Node) -> bool:
    return node.args[1:] == (0,) and len(node.all_input_nodes) == 1


def _shared_batch_size(graph: fx.Graph, sizes: set[fx.Node]) -> fx.Node:
    """Put one node in the place of all `x.size(0)` and `x.shape[0]`, which every stage can read from its features."""
    images, *others = graph.nodes
    with graph.inserting_after(images):
        batch_size = graph.call_method("size", (images, 0))
    for node in others:
        if node in sizes:
            (source,) = node.all_input_nodes
            node.replace_all_uses_with(batch_size)
            graph.erase_node(node)
            if not source.users and source.op != "placeholder":
                graph.erase_node(source)
    return batch_size


def _symbolic(backbone: nn.Module, opened: set[str], training: bool) -> tuple[fx.Graph, dict[str, fx.Node]]:
    others = list(inspect.signature(backbone.forward).parameters.values())[1:]
    defaults = {other.name: other.default for other in others if other.default is not other.empty}
    tracer = _CoarseTracer(opened)
    with mode(backbone, training):
        graph = tracer.trace(backbone, defaults or None)
    images = str(next(iter(graph.nodes)).target)
    if images.startswith("*"):
        raise ValueError(f"its forward takes {images}, not an argument for the images")
    # For arguments with a default, torch.fx leaves placeholders and checks that no other value is given.
    for unused in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        for check in list(unused.users):
            for asserted in list(check.users):
                graph.erase_node(asserted)
            graph.erase_node(check)
        graph.erase_node(unused)
    return graph, tracer.returned


def _chain(calls: Sequence[Call], opened: set[str]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Modules one after another; `ValueError` unless each receives the very tensor that the one before returned.

    Nothing may have written to it in between.
    """
    called = {call.name for call in calls}
    inside: dict[str, list[Call]] = {name: [] for name in called}
    for call in calls[:-1]:
        parents = accumulate(call.name.split(".")[:-1], "{}.{}".format)
        inside[next((p for p in reversed(list(parents)) if p in called), "")].append(call)
    graph, returned = fx.Graph(), dict[str, fx.Node]()

    def follow(call: Call, node: fx.Node) -> fx.Node:
        if call.name not in opened:
            node = graph.call_module(call.name, (node,))
        else:
            value, version = call.received[0], call.versions[0]
            for child in inside[call.name]:
                if _is_flattened(child.received, value):
                    node = graph.call_function(torch.flatten, (node, 1))
                elif len(child.received) != 1 or child.received[0] is not value:
                    raise ValueError(f"{child.name!r} receives something other than what the module before it returned")
                if child.versions[0] != version:
                    raise ValueError(f"what {child.name!r} receives was written to by code between the modules")
                node, value, version = follow(child, node), child.returned, child.versions[1]
            if value is not call.returned or version != call.versions[1]:
                raise ValueError(f"{call.name or 'the backbone'!r} returns something other than its last module")
        returned[call.name] = node
        return node

    graph.output(follow(calls[-1], graph.placeholder("images")))
    return graph, returned


def _is_flattened(received: tuple[Any, ...], value: Any) -> bool:
    """Whether [N, F] was received of a map [N, C, H, W] or [N, C, L] in the same memory."""
    both = (*received, value)
    if (
        len(both) != 2
        or not all(isinstance(v, Tensor) for v in both)
        or both[0].dim() != 2
        or both[1].dim() not in (3, 4)
    ):
        return False
    return both[0].data_ptr() == value.data_ptr() and both[0].shape == value.flatten(1).shape


def _follow_training_flag(trained: fx.Graph, graph: fx.Graph) -> None:
    """Make arguments that were `self.training` while tracing follow the flag again, in `graph`.

    `ValueError` where the two modes differ in anything else.
    """

    def same(in_training: Any, value: Any) -> Any:
        if in_training is True and value is False:
            return graph.create_node("call_module", TRAINING)
        if str(in_training) != str(value):
            raise ValueError(
                f"in training mode the backbone computes {in_training} instead of {value}; make it the same in "
                "both, for instance with aux_logits=False"
            )
        return value

    for other, node in list(zip(trained.nodes, graph.nodes, strict=False)):
        with graph.inserting_before(node):
            same(other.target, node.target)
            same([len(other.args), *other.kwargs], [len(node.args), *node.kwargs])
            node.args = tuple(map(same, other.args, node.args))
            node.kwargs = {key: same(other.kwargs[key], value) for key, value in node.kwargs.items()}


def module_of(backbone: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph with the modules and parameters that it names."""
    return graph_module(attributes(backbone, graph, {TRAINING: _TrainingMode()}), graph)
