"""Attach exits to any backbone: a network from images to logits, cut behind named modules → `EarlyExitNet`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from .heads import ExitHead
from .model import EarlyExitNet
from .tracing import Tracer, attributes

_TRAINING = "training_mode"


def attach(
    backbone: nn.Module,
    exits: Sequence[str],
    *,
    head: str = "pool",
    num_classes: int | None = None,
    input_shape: Sequence[int] = (3, 224, 224),
    criterion: str = "learned",
    thresholds: Sequence[float] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
) -> EarlyExitNet:
    """The backbone with early exits; shares its modules, so that training either trains both.

    backbone: images [N, C, H, W] → logits [N, K], the last layer an `nn.Linear`; from torchvision, timm or your own.
    exits: names of modules, as in `backbone.named_modules()` and in the order in which they run; each returns one map
        [N, C, H, W] that is all the rest of the backbone needs. An exit is placed behind each.
    head: kind of the early exits' heads, see `eefast.heads.ExitHead`.
    num_classes: by default, and at most a check, the width of the backbone's own answer.
    input_shape: (C, H, W) of the images, for which the costs are counted.
    criterion, thresholds, normalization: see `EarlyExitNet`.

    The backbone's own pooling and last linear are the final exit, so that without early exits the answers are the
    backbone's. Two images run through the backbone in eval mode; its statistics and training flags stay as they are.
    The network is in training mode if the backbone is.
    Raises `ValueError` for names, cuts and backbones that do not fit, saying which would.
    """
    _check_names(backbone, exits)
    images = _images(backbone, input_shape)
    calls = _watch(backbone, images)
    name, classifier = _classifier(calls, num_classes)
    _check_maps(exits, calls, images)
    trace = _trace(backbone, calls, images, [*exits, name])
    cuts = _cuts(trace, exits)
    stages, heads = [], []
    for source, cut in pairwise([trace.nodes[0], *cuts]):
        stages.append(_stage(trace, source, trace.between(source, cut), cut))
        heads.append(ExitHead(head, trace.values[cut].shape[1:], classifier.out_features, input_shape))
    stage, final = _final(trace, cuts, classifier, input_shape)
    net = EarlyExitNet(
        _separate([*stages, stage], images),
        [h.to(images) for h in [*heads, final]],
        input_shape=input_shape,
        criterion=criterion,
        thresholds=thresholds,
        normalization=normalization,
    ).to(images.device)
    _check_answers(net, images, calls[-1].returned)
    return net if backbone.training else net.eval()


def new_parameters(net: EarlyExitNet) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that `attach` made: the early heads and the final exit's confidence row."""
    confidence = f"heads.{net.num_exits}.confidence."
    early = tuple(f"heads.{i}." for i in range(net.num_exits))
    return [(name, value) for name, value in net.named_parameters() if name.startswith((*early, confidence))]


def _check_names(backbone: nn.Module, exits: Sequence[str]) -> None:
    if isinstance(exits, str):
        raise ValueError(f"exits={exits!r} must be a list of names: exits=[{exits!r}]")
    names = [name for name, _ in backbone.named_modules() if name]
    for name in exits:
        if name not in names:
            close = " or ".join(map(repr, get_close_matches(name, names))) or "one of backbone.named_modules()"
            raise ValueError(f"exits={list(exits)}: the backbone has no module {name!r}; take {close}")


def _images(backbone: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Two images of noise, where the weights are and in their dtype."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape={tuple(input_shape)} must be (C, H, W), each at least 1")
    weight = next(backbone.parameters(), torch.empty(0))
    return torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(weight)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every module's own flag comes back afterwards, since a user may have frozen some of them."""
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = training
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


def _run(module: nn.Module, x: Tensor, training: bool = False) -> Any:
    with torch.no_grad(), _mode(module, training):
        return module(x)


@dataclass(frozen=True)
class _Call:
    """One call of a module: what it received by position and what it returned."""

    name: str
    module: nn.Module
    received: tuple[Any, ...]
    returned: Any


def _watch(backbone: nn.Module, images: Tensor, training: bool = False) -> list[_Call]:
    """All calls of modules in the order in which they end; the backbone's own, called "", is the last."""
    calls: list[_Call] = []

    def note(name: str) -> Any:
        return lambda module, received, returned: calls.append(_Call(name, module, received, returned))

    hooks = [module.register_forward_hook(note(name)) for name, module in backbone.named_modules()]
    try:
        _run(backbone, images.clone(), training)
    except Exception as error:
        shape = tuple(images.shape[1:])
        raise ValueError(f"input_shape={shape}: the backbone cannot take such images ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _classifier(calls: Sequence[_Call], num_classes: int | None) -> tuple[str, nn.Linear]:
    """The linear whose output is the backbone's answer."""
    logits = calls[-1].returned
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ValueError(f"the backbone returns {what}; wrap it in a module that returns logits [N, K]")
    found = [call for call in calls if isinstance(call.module, nn.Linear) and call.returned is logits]
    if not found:
        last = [call for call in calls if not any(call.module.children())][-1]
        raise ValueError(
            f"the backbone's answer comes from {last.name!r}, {last.module}; it must be the output of an nn.Linear"
        )
    name, linear = found[-1].name, found[-1].module
    assert isinstance(linear, nn.Linear)
    if linear.bias is None:
        raise ValueError(
            f"the backbone's last layer {name!r} has no bias; give it one: "
            f"backbone.{name}.bias = nn.Parameter(torch.zeros({linear.out_features}))"
        )
    if num_classes not in (None, linear.out_features):
        raise ValueError(
            f"num_classes={num_classes}, but the backbone answers with {linear.out_features}; first replace its last "
            f"layer {name!r} by nn.Linear({linear.in_features}, {num_classes})"
        )
    return name, linear


def _check_maps(exits: Sequence[str], calls: Sequence[_Call], images: Tensor) -> None:
    for name in exits:
        returned = [call.returned for call in calls if call.name == name]
        where = f"exits={list(exits)}: {name!r}"
        if len(returned) != 1:
            raise ValueError(f"{where} is called {len(returned)} times; take a module that is called once")
        (value,) = returned
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{where} returns a {type(value).__name__}; take a module that returns one map [N, C, H, W]"
            )
        if value.dim() != 4 or len(value) != len(images) or _is_channels_last(value, images):
            shape = ", ".join(["N", *map(str, value.shape[1:])])
            raise ValueError(f"{where} returns shape [{shape}], but an exit needs maps [N, C, H, W]")


def _is_channels_last(value: Tensor, images: Tensor) -> bool:
    """Whether the shape looks like [N, H, W, C]: the image's proportions stand there and not at the end."""
    height, width = images.shape[2:]
    off = [abs(a * width - b * height) for a, b in (value.shape[1:3], value.shape[2:])]
    return off[0] == 0 and off[1] > max(height, width)


class _TrainingMode(nn.Module):
    """Says at run time what `self.training` was for the traced code."""

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
class _Trace:
    """The backbone as nodes in the order in which they run.

    returned: by name of a module, the node that it returns. values: what nodes are for the two images. batch_size:
    the node that says how many they are.
    """

    backbone: nn.Module
    nodes: tuple[fx.Node, ...]
    returned: dict[str, fx.Node]
    values: dict[fx.Node, Any]
    batch_size: fx.Node

    def position(self, node: fx.Node) -> int:
        return self.nodes.index(node)

    def between(self, source: fx.Node, result: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes behind `source`, up to and with `result`."""
        return self.nodes[self.position(source) + 1 : self.position(result) + 1]

    def also_needed(self, cut: fx.Node) -> list[fx.Node]:
        """What besides `cut` is used behind it; parameters and the batch size are at hand everywhere."""
        here = self.position(cut)
        behind = set(self.nodes[here + 1 :])
        before = (node for node in self.nodes[:here] if node.op != "get_attr" and node is not self.batch_size)
        return [node for node in before if behind & node.users.keys()]

    def is_map(self, node: fx.Node) -> bool:
        value = self.values.get(node)
        return isinstance(value, Tensor) and value.dim() == 4


def _trace(backbone: nn.Module, calls: Sequence[_Call], images: Tensor, names: Sequence[str]) -> _Trace:
    """Traced by torch.fx, or followed from module to module where that is impossible; the last name ends it."""
    opened = {"", *(parent for name in names for parent in accumulate(name.split(".")[:-1], "{}.{}".format))}
    try:
        (trained, _), (graph, returned) = (_symbolic(backbone, opened, training) for training in (True, False))
    except Exception as error:  # torch.fx raises whatever the traced code does
        try:
            # A copy, since in training mode the statistics change.
            (trained, _) = _chain(_watch(copy.deepcopy(backbone), images, training=True), opened)
            (graph, returned) = _chain(calls, opened)
        except ValueError as why:
            raise ValueError(
                f"the backbone cannot be cut: torch.fx cannot trace it ({error}), and its modules do not run one "
                f"behind another ({why}); make it an nn.Sequential or build eefast.EarlyExitNet(stages, heads, ...)"
            ) from error
    _follow_training_flag(trained, graph)
    copies: dict[fx.Node, fx.Node] = {}
    whole = fx.Graph()
    whole.graph_copy(graph, copies)
    whole.output(tuple(copies.values()))
    values = _run(fx.GraphModule(_attributes(backbone, graph), whole), images.clone())
    value_of = dict(zip(copies, values, strict=True))
    batch_size = _shared_batch_size(graph, value_of)
    nodes = list(graph.nodes)
    return _Trace(backbone, tuple(nodes[: nodes.index(returned[names[-1]]) + 1]), returned, value_of, batch_size)


def _shared_batch_size(graph: fx.Graph, values: dict[fx.Node, Any]) -> fx.Node:
    """One node for all of `x.size(0)` and `x.shape[0]`, which every stage can read from its own features."""
    images, *others = graph.nodes
    with graph.inserting_after(images):
        batch_size = graph.call_method("size", (images, 0))
    for node in others:
        value = values.get(node)
        if isinstance(value, int) and value == len(values[images]) and node.args[1:] == (0,):
            (source,) = node.all_input_nodes
            node.replace_all_uses_with(batch_size)
            graph.erase_node(node)
            if not source.users and isinstance(values[source], torch.Size):
                graph.erase_node(source)
    return batch_size


def _symbolic(backbone: nn.Module, opened: set[str], training: bool) -> tuple[fx.Graph, dict[str, fx.Node]]:
    others = list(inspect.signature(backbone.forward).parameters.values())[1:]
    defaults = {other.name: other.default for other in others if other.default is not other.empty}
    tracer = _CoarseTracer(opened)
    with _mode(backbone, training):
        graph = tracer.trace(backbone, defaults or None)
    # Of arguments with a default, torch.fx leaves placeholders and checks that nobody gave another value.
    for unused in [node for node in graph.nodes if node.op == "placeholder"][1:]:
        for check in list(unused.users):
            graph.erase_node(check)
        graph.erase_node(unused)
    return graph, tracer.returned


def _chain(calls: Sequence[_Call], opened: set[str]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Modules one behind another; `ValueError` unless each receives the very tensor that the one before returned."""
    called = {call.name for call in calls}
    inside: dict[str, list[_Call]] = {name: [] for name in called}
    for call in calls[:-1]:
        parents = accumulate(call.name.split(".")[:-1], "{}.{}".format)
        inside[next((p for p in reversed(list(parents)) if p in called), "")].append(call)
    graph, returned = fx.Graph(), dict[str, fx.Node]()

    def follow(call: _Call, node: fx.Node) -> fx.Node:
        if call.name not in opened:
            node = graph.call_module(call.name, (node,))
        else:
            value = call.received[0]
            for child in inside[call.name]:
                if _is_flattened(child.received, value):
                    node = graph.call_function(torch.flatten, (node, 1))
                elif len(child.received) != 1 or child.received[0] is not value:
                    raise ValueError(f"{child.name!r} receives something else than the module before it returned")
                node, value = follow(child, node), child.returned
            if value is not call.returned:
                raise ValueError(f"{call.name or 'the backbone'!r} returns something else than its last module")
        returned[call.name] = node
        return node

    graph.output(follow(calls[-1], graph.placeholder("images")))
    return graph, returned


def _is_flattened(received: tuple[Any, ...], value: Any) -> bool:
    """Whether [N, F] was received of a map [N, C, H, W] in the same memory."""
    both = (*received, value)
    if len(both) != 2 or not all(isinstance(v, Tensor) for v in both) or [v.dim() for v in both] != [2, 4]:
        return False
    return both[0].data_ptr() == value.data_ptr() and both[0].shape == value.flatten(1).shape


def _follow_training_flag(trained: fx.Graph, graph: fx.Graph) -> None:
    """Make arguments that were `self.training` while tracing follow the flag again, in `graph`.

    `ValueError` where the two modes differ in anything else.
    """

    def same(in_training: Any, value: Any) -> Any:
        if in_training is True and value is False:
            return graph.create_node("call_module", _TRAINING)
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


def _attributes(backbone: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """The modules and parameters that the graph names."""
    return attributes(backbone, graph, {_TRAINING: _TrainingMode()})


def _cuts(trace: _Trace, exits: Sequence[str]) -> list[fx.Node]:
    """The nodes behind which the exits stand."""
    cuts = [trace.returned[name] for name in exits]
    in_order = sorted(exits, key=lambda name: trace.position(trace.returned[name]))
    if in_order != list(exits):
        raise ValueError(f"exits={list(exits)} do not stand in the order in which they run; write exits={in_order}")
    for name, cut in zip(exits, cuts, strict=True):
        if cuts.count(cut) > 1:
            raise ValueError(
                f"exits={list(exits)}: {name!r} stands at the same place as another; leave one of them out"
            )
        needed = trace.also_needed(cut)
        if needed:
            what = " and ".join(_name(trace, node) for node in needed)
            behind = {n: node for n, node in trace.returned.items() if node in trace.nodes[trace.position(cut) + 1 :]}
            fitting = [n for n, node in behind.items() if trace.is_map(node) and not trace.also_needed(node)]
            # Of a block and its last layer, which stand at the same place, the block.
            fitting.sort(key=lambda n: (trace.position(behind[n]), n.count(".")))
            advice = f"take {fitting[0]!r}" if fitting else "no module behind it would do"
            raise ValueError(f"exits={list(exits)}: behind {name!r} the backbone still needs {what}; {advice}")
    return cuts


def _name(trace: _Trace, node: fx.Node) -> str:
    names = [name for name, returned in trace.returned.items() if returned is node]
    return f"what {names[0]!r} returned" if names else f"the value {node.name!r}"


def _stage(
    trace: _Trace, source: fx.Node, nodes: Sequence[fx.Node], result: fx.Node, as_map: bool = False
) -> fx.GraphModule:
    """The nodes as a module from `source` to `result`; as_map: [N, F] is returned as [N, F, 1, 1]."""
    graph = fx.Graph(tracer_cls=Tracer)
    features = graph.placeholder("features")
    copies = {source: features}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            own_size = node is trace.batch_size
            copies[node] = graph.call_method("size", (features, 0)) if own_size else graph.node_copy(node, copied)
        return copies[node]

    for node in nodes:
        if node is trace.batch_size:
            continue  # read where it is used
        # Behind an accelerated stage maps are channels-last, which `view` cannot flatten.
        if copied(node).op == "call_method" and node.target == "view":
            copied(node).target = "reshape"
    out = copied(result)
    graph.output(graph.call_method("unflatten", (out, 1, (-1, 1, 1))) if as_map else out)
    return fx.GraphModule(_attributes(trace.backbone, graph), graph)


def _has_weights(trace: _Trace, node: fx.Node) -> bool:
    if node.op == "call_module" and node.target != _TRAINING:
        module = trace.backbone.get_submodule(str(node.target))
        return any(True for _ in chain(module.parameters(), module.buffers()))
    return node.op == "get_attr"


def _final(
    trace: _Trace, cuts: Sequence[fx.Node], classifier: nn.Linear, input_shape: Sequence[int]
) -> tuple[fx.GraphModule, ExitHead]:
    """Last stage and final exit, which has the backbone's own pooling, if it is an average, and its own linear.

    Any other end of the backbone goes into the stage, whose maps then have one pixel.
    """
    (read,) = trace.nodes[-1].all_input_nodes
    source = (trace.nodes[0], *cuts)[-1]
    rest = trace.nodes[trace.position(source) + 1 : -1]
    if cuts and not any(_has_weights(trace, node) for node in rest):
        raise ValueError(f"exits: behind {_name(trace, source)} no weights are left but the classifier's; leave it out")
    for node in reversed((source, *rest)):
        tail = trace.nodes[trace.position(node) + 1 : -1]
        if any(_has_weights(trace, later) for later in tail):
            break
        if trace.is_map(node) and not trace.also_needed(node):
            pool, (channels, *size) = _stage(trace, node, tail, read), trace.values[node].shape[1:]
            if channels == classifier.in_features and _averages(pool, trace.values[node]):
                head = ExitHead("pool", (channels, *size), classifier.out_features, input_shape)
                head.pool, head.classifier = nn.Sequential(pool), classifier
                return _stage(trace, source, trace.between(source, node), node), head
    head = ExitHead("pool", (classifier.in_features, 1, 1), classifier.out_features, input_shape)
    head.classifier = classifier
    return _stage(trace, source, rest, read, as_map=True), head


def _averages(pool: nn.Module, like: Tensor) -> bool:
    """Whether `pool` maps [N, C, H, W] to the mean [N, C]; tried, since there are many ways to write it."""
    n, channels, *size = like.shape
    shape = (n, channels, *size) if size != [1, 1] else (n, channels, 5, 3)
    # Large, so that an activation behind the pooling shows, and float64, so that rounding does not.
    x = 100 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(like.device)
    try:
        out = _run(pool, x.clone())
    except Exception:  # a pooling with a window of fixed size, for instance
        return False
    return out.shape == (n, channels) and torch.allclose(out.double(), x.mean((2, 3)), rtol=0, atol=1e-3)


def _separate(stages: list[fx.GraphModule], images: Tensor) -> list[fx.GraphModule]:
    """Let stages that would overwrite their features copy them: for its gradients the head before still needs them."""
    features = images.clone()
    for i, stage in enumerate(stages):
        before = features._version
        result = _run(stage, features)
        if i and features._version != before:
            source = next(iter(stage.graph.nodes))
            with stage.graph.inserting_after(source):
                own = stage.graph.call_method("clone", (source,))
            source.replace_all_uses_with(own, lambda user, own=own: user is not own)
            stage.recompile()
        features = result
    return stages


def _check_answers(net: EarlyExitNet, images: Tensor, expected: Tensor) -> None:
    """What tracing cannot see, a branch on the images for instance, shows here."""
    got = _run(net.plain(), images.clone())
    if not torch.allclose(got, expected, rtol=0.01, atol=0.01 * float(expected.abs().max()), equal_nan=True):
        raise ValueError(
            f"the cut backbone answers {(got - expected).abs().max():.3g} off the whole one, so it computes something "
            "that torch.fx does not see; build eefast.EarlyExitNet(stages, heads, ...) from its modules"
        )
