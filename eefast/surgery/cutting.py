"""A backbone and names of exits → the graphs of its stages and of the final exit's pooling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..modules.contexts import isolated, same_randomness
from ..modules.copies import working_copy
from ..modules.tracing import Tracer, recompile
from .calls import find_classifier, layouts_of, noise_images, other_sizes, run, watch
from .graph import TRAINING, Trace, module_of, traced
from .layouts import MAP, as_map, undone
from .trial import averages, check_answers


class _QuickNorms(TorchFunctionMode):
    """On the meta device a BatchNorm returns its shape at once; torch would compute in Python for milliseconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.batch_norm and isinstance(args[0], Tensor) and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cut:
    """The parts of a backbone as graphs, which name modules and parameters by their path in it.

    stages: one per exit, from features to features. features: what each stage returned for the images of the trial;
    of tokens [N, T, C] the maps [N, C, 1, T]. layouts: of what each exit returned, see `layouts.layout_of`.
    pool: the final exit's pooling where it is an average, else None. classifier: path of the last linear.
    """

    stages: list[fx.Graph]
    features: list[Tensor]
    layouts: list[str]
    pool: fx.Graph | None
    classifier: str


def cut_at(backbone: nn.Module, exits: Sequence[str], num_classes: int | None, input_shape: Sequence[int]) -> Cut:
    """Cut after each of the exits; hooks, modes and trials are on a copy of the backbone."""
    copied = working_copy(backbone)
    images = noise_images(copied, input_shape)
    quick = _QuickNorms() if images.is_meta else nullcontext()
    with isolated(images.device), same_randomness(images.device), quick:
        calls = watch(copied, images)
        name, classifier = find_classifier(calls, num_classes)
        found = layouts_of(exits, calls, images)
        others = [] if images.is_meta else other_sizes(copied, images)
        trace = traced(copied, calls, [images, *(x for x, _ in others)], [*exits, name])
        cuts = _cuts(trace, exits)
        places = dict(zip(cuts, found, strict=True))
        stages = [
            _stage(trace, places, source, trace.between(source, cut), cut)
            for source, cut in pairwise([trace.nodes[0], *cuts])
        ]
        stage, pool = _final(trace, places, classifier)
        cut = Cut([*stages, stage], [], found, pool, name)
        modules = [module_of(copied, graph) for graph in cut.stages]
        cut.features.extend(_separate(modules, images))
        tail = nn.Flatten() if pool is None else module_of(copied, pool)
        if not images.is_meta:
            check_answers(nn.Sequential(*modules, tail, classifier), copied, [(images, calls[-1].returned), *others])
    return cut


def _cuts(trace: Trace, exits: Sequence[str]) -> list[fx.Node]:
    """The nodes after which the exits are; `ValueError` for wrong orders and places, with the right ones."""
    cuts = [trace.returned[name] for name in exits]
    in_order = sorted(exits, key=lambda name: trace.position(trace.returned[name]))
    if in_order != list(exits):
        raise ValueError(f"exits={list(exits)} are not in the order in which they run; write exits={in_order}")
    for name, cut in zip(exits, cuts, strict=True):
        if cuts.count(cut) > 1:
            raise ValueError(
                f"exits={list(exits)}: {name!r} is at the same place as another exit; leave one of them out"
            )
        needed = trace.also_needed(cut)
        if needed:
            what = " and ".join(_name(trace, node) for node in needed)
            later = {n: node for n, node in trace.returned.items() if node in trace.nodes[trace.position(cut) + 1 :]}
            fitting = [n for n, node in later.items() if trace.is_map(node) and not trace.also_needed(node)]
            # Of a block and its last layer, which are at the same place, the block.
            fitting.sort(key=lambda n: (trace.position(later[n]), n.count(".")))
            advice = f"take {fitting[0]!r}" if fitting else "no later module would do"
            raise ValueError(f"exits={list(exits)}: after {name!r} the backbone still needs {what}; {advice}")
    return cuts


def _name(trace: Trace, node: fx.Node) -> str:
    names = [name for name, returned in trace.returned.items() if returned is node]
    return f"what {names[0]!r} returned" if names else f"the value {node.name!r}"


def _stage(
    trace: Trace,
    places: Mapping[fx.Node, str],
    source: fx.Node,
    nodes: Sequence[fx.Node],
    result: fx.Node,
    width: int | None = None,
) -> fx.Graph:
    """The nodes from `source` to `result`; with a width, [N, width] is returned as a map of one pixel.

    places: of the exits, each with its layout, in which the stage takes or returns a map.
    """
    graph = fx.Graph(tracer_cls=Tracer)
    features = graph.placeholder("features")
    copies = {source: undone(graph, features, places.get(source, MAP))}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            is_size = node is trace.batch_size
            copies[node] = graph.call_method("size", (features, 0)) if is_size else graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        if node is trace.batch_size:
            continue  # read where it is used
        # After an accelerated stage maps are channels-last, which `view` cannot flatten.
        if copied(node).op == "call_method" and node.target == "view":
            copied(node).target = "reshape"
    out = as_map(graph, copied(result), places.get(result, MAP))
    pixel = [1] * (trace.values[trace.nodes[0]].dim() - 2)
    # A backbone may have squeezed a single image to [width].
    graph.output(out if width is None else graph.call_method("reshape", (out, -1, width, *pixel)))
    return graph


def _has_weights(trace: Trace, node: fx.Node) -> bool:
    if node.op == "call_module" and node.target != TRAINING:
        module = trace.backbone.get_submodule(str(node.target))
        return any(True for _ in chain(module.parameters(), module.buffers()))
    return node.op == "get_attr"


def _final(trace: Trace, places: Mapping[fx.Node, str], classifier: nn.Linear) -> tuple[fx.Graph, fx.Graph | None]:
    """Last stage, and the pooling of the final exit: the backbone's if it is an average at every size.

    Any other end of the backbone goes into the stage, whose maps then have one pixel.
    """
    (read,) = trace.nodes[-1].all_input_nodes
    source = (trace.nodes[0], *places)[-1]
    rest = trace.nodes[trace.position(source) + 1 : -1]
    if places and not any(_has_weights(trace, node) for node in rest):
        raise ValueError(f"exits: after {_name(trace, source)} only the classifier has weights; leave this exit out")
    for node in reversed((source, *rest)):
        tail = trace.nodes[trace.position(node) + 1 : -1]
        if any(_has_weights(trace, later) for later in tail):
            break
        if trace.is_map(node) and not trace.also_needed(node):
            pool, channels = _stage(trace, {}, node, tail, read), trace.values[node].shape[1]
            runnable = module_of(trace.backbone, pool)
            if channels == classifier.in_features and averages(runnable, trace.values[node]):
                return _stage(trace, places, source, trace.between(source, node), node), pool
    return _stage(trace, places, source, rest, read, width=classifier.in_features), None


def _separate(stages: list[fx.GraphModule], images: Tensor) -> list[Tensor]:
    """Make stages that would overwrite their features copy them: the head before needs them for its gradients.

    Returns each stage's features.
    """
    features, found = images.clone(), []
    for i, stage in enumerate(stages):
        before = features._version
        result = run(stage, features)
        if i and features._version != before:
            source = next(iter(stage.graph.nodes))
            with stage.graph.inserting_after(source):
                copy = stage.graph.call_method("clone", (source,))
            source.replace_all_uses_with(copy, lambda user, copy=copy: user is not copy)
            recompile(stage)
        # What a module with inference mode inside returns counts no writes.
        features = result.clone() if result.is_inference() else result
        found.append(features)
    return found
