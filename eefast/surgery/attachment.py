"""Attach exits to any backbone: a network from images to logits, cut behind named modules → `EarlyExitNet`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..modules.contexts import isolated, mode, same_randomness
from ..modules.copies import special_kind, working_copy
from ..modules.tracing import Tracer, attributes, graph_module, recompile
from .backbones import origin

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
    backbone's, at every image size that it takes. All trials run on a copy of it, for which memory must be there; the
    backbone's tensors, flags and hooks stay as they are. The network is in training mode if the backbone is.
    Raises `ValueError` for names, cuts and backbones that do not fit, saying which would.
    """
    _check_backbone(backbone)
    return rebuild(
        backbone,
        exits,
        head=head,
        num_classes=num_classes,
        input_shape=input_shape,
        criterion=criterion,
        thresholds=thresholds,
        normalization=normalization,
    )


def rebuild(
    backbone: nn.Module,
    exits: Sequence[str],
    *,
    head: str,
    num_classes: int | None,
    input_shape: Sequence[int],
    criterion: str,
    normalization: tuple[Sequence[float], Sequence[float]] | None,
    thresholds: Sequence[float] | None = None,
) -> EarlyExitNet:
    """As `attach`, which made the network once; on the meta device it takes no memory, and no answers are compared."""
    exits = _check_names(backbone, exits)
    cut = _cut(backbone, exits, num_classes, input_shape)
    # Layers that are made in inference mode could not be trained, those on another default device not used.
    with torch.inference_mode(False), torch.device("cpu"):
        stages = [_module(backbone, graph) for graph in cut.stages]
        linear = backbone.get_submodule(cut.classifier)
        assert isinstance(linear, nn.Linear)
        heads = []
        for i, features in enumerate(cut.features):
            kind, like = (head, features) if i < len(exits) else ("pool", linear.weight)
            with features.device if features.is_meta else nullcontext():
                heads.append(ExitHead(kind, features.shape[1:], linear.out_features, input_shape).to(like))
        heads[-1].classifier = linear
        if cut.pool is not None:
            heads[-1].pool = nn.Sequential(_module(backbone, cut.pool))
        net = EarlyExitNet(
            stages,
            heads,
            input_shape=input_shape,
            criterion=criterion,
            thresholds=thresholds,
            normalization=normalization,
        )
    name = origin(backbone)
    if name is None:
        net.built_from = f"a {type(backbone).__name__} that eefast.surgery.backbone did not make, or that was changed"
    else:
        net.config = {
            "kind": "attached",
            "backbone": name,
            "exits": exits,
            "head": head,
            "num_classes": net.num_classes,
            "input_shape": list(input_shape),
        }
    name, first = next(net.named_parameters())
    if not first.is_floating_point():
        raise ValueError(
            f"{name} is {first.dtype}; the network's first parameter says what images are, so make it real"
        )
    theirs = set(backbone.modules())
    for made in net.modules():
        if made not in theirs:
            made.training = backbone.training
    return net


class _QuickNorms(TorchFunctionMode):
    """A BatchNorm on the meta device says its shape at once; torch would compute in Python for milliseconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.batch_norm and isinstance(args[0], Tensor) and args[0].is_meta:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class _Cut:
    """The backbone as graphs, which name modules and parameters by their path in it.

    stages: one per exit, from features to features. features: what each returned for the images of the trial.
    pool: of the final exit, where that is an average. classifier: path of the last linear.
    """

    stages: list[fx.Graph]
    features: list[Tensor]
    pool: fx.Graph | None
    classifier: str


def _cut(backbone: nn.Module, exits: Sequence[str], num_classes: int | None, input_shape: Sequence[int]) -> _Cut:
    """Everything is tried on a copy: hooks are set there, and modes switched."""
    copied = working_copy(backbone)
    images = _images(copied, input_shape)
    quick = _QuickNorms() if images.is_meta else nullcontext()
    with isolated(images.device), same_randomness(images.device), quick:
        calls = _watch(copied, images)
        name, classifier = _classifier(calls, num_classes)
        _check_maps(exits, calls, images)
        others = [] if images.is_meta else _other_sizes(copied, images)
        trace = _trace(copied, calls, [images, *(x for x, _ in others)], [*exits, name])
        cuts = _cuts(trace, exits)
        stages = [
            _stage(trace, source, trace.between(source, cut), cut) for source, cut in pairwise([trace.nodes[0], *cuts])
        ]
        stage, pool = _final(trace, cuts, classifier)
        cut = _Cut([*stages, stage], [], pool, name)
        modules = [_module(copied, graph) for graph in cut.stages]
        cut.features.extend(_separate(modules, images))
        tail = nn.Flatten() if pool is None else _module(copied, pool)
        if not images.is_meta:
            _check_answers(nn.Sequential(*modules, tail, classifier), copied, [(images, calls[-1].returned), *others])
    return cut


def new_parameters(net: EarlyExitNet) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that `attach` made: the early heads and the final exit's confidence row."""
    confidence = f"heads.{net.num_exits}.confidence."
    early = tuple(f"heads.{i}." for i in range(net.num_exits))
    return [(name, value) for name, value in net.named_parameters() if name.startswith((*early, confidence))]


def _check_backbone(backbone: nn.Module) -> None:
    """`ValueError`, before any work, for what cannot be cut, with the way out."""
    if not isinstance(backbone, nn.Module):
        raise ValueError(
            f"backbone is a {type(backbone).__name__}; give an nn.Module that maps images to logits [N, K]"
        )
    for name, m in backbone.named_modules():
        where = f"backbone.{name}" if name else "the backbone"
        kinds = {kind.__name__ for kind in type(m).__mro__}
        if isinstance(m, torch.jit.ScriptModule):
            raise ValueError(f"{where} is a ScriptModule, which cannot be cut; give the module that it was made from")
        if kinds & {"EarlyExitNet", "Accelerated"}:
            raise ValueError(f"{where} has exits already ({type(m).__name__}); give one without, such as net.plain()")
        if kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}:
            raise ValueError(f"{where} is a {type(m).__name__}; attach exits to its module first, then wrap the result")
        if ".quantized" in type(m).__module__:
            raise ValueError(f"{where} is a quantized {type(m).__name__}; attach exits first, then quantize the result")
        for key, t in chain(m.named_parameters(recurse=False), m.named_buffers(recurse=False)):
            why = _obstacle(t)
            if why:
                raise ValueError(f"{'.'.join(filter(None, ('backbone', name, key)))} {why}")


def _obstacle(t: Tensor) -> str:
    if is_lazy(t):
        return "has no shape yet; run the backbone on one image first"
    special = special_kind(t)
    if special:
        return f"is a {special}; attach exits to the backbone with plain tensors first"
    if t.is_meta:
        return "is on the meta device, without values; give it some, by .to_empty(device=...) and load_state_dict"
    if t.is_quantized:
        return "is quantized; attach exits first, then quantize the result"
    if t.layout != torch.strided:
        return f"has layout {t.layout}; make it dense by .to_dense()"
    return ""


def _check_names(backbone: nn.Module, exits: Sequence[str]) -> list[str]:
    """The names under which `named_modules` lists the exits, where a module has several."""
    if isinstance(exits, str):
        raise ValueError(f"exits={exits!r} must be a list of names: exits=[{exits!r}]")
    listed = {m: name for name, m in backbone.named_modules()}
    modules = {name: m for name, m in backbone.named_modules(remove_duplicate=False) if name}
    for name in exits:
        if name not in modules:
            inside = [other for other in modules if other.endswith(f".{name}")]
            close = " or ".join(map(repr, (inside or get_close_matches(name, modules))[:3]))
            close = close or "one of backbone.named_modules()"
            raise ValueError(f"exits={list(exits)}: the backbone has no module {name!r}; take {close}")
    return [listed[modules[name]] for name in exits]


def _images(backbone: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """Two images of noise, where the weights are and in their dtype."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(f"input_shape={tuple(input_shape)} must be (C, H, W), each at least 1")
    weights = (p for p in backbone.parameters() if p.is_floating_point())
    like = next(weights, torch.empty(0, device="cpu"))
    # Where no values tell sizes apart, a batch of a number that nothing else has.
    return _noise(17 if like.is_meta else 2, input_shape, like)


def _noise(n: int, shape: Sequence[int], like: Tensor) -> Tensor:
    if like.is_meta:
        return like.new_empty(n, *shape)
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(n, *shape, generator=generator, device="cpu", dtype=torch.float32).to(like)


def _other_sizes(backbone: nn.Module, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One larger and three smaller images, none of them square, and what the backbone answers.

    Where it takes no such images, they are of the size that it was given.
    """
    channels, h, w = images.shape[1:]
    found = []
    for n, sizes in (
        (1, [(h + h // 2 + 1, w + w // 4 + 2), (2 * h, 3 * w), (h, w)]),
        (3, [(h - h // 4, w // 2 + 1), (h, max(w // 2, 1)), (h, w)]),
    ):
        for size in sizes:
            x = _noise(n, (channels, *size), images)
            try:
                found.append((x, _run(backbone, x.clone())))
                break
            except Exception as error:  # whatever the backbone raises
                failed = error
        else:
            raise ValueError(f"the backbone takes a batch of 2 images, but not of {n} ({failed})")
    return found


def _run(module: nn.Module, x: Tensor, training: bool = False) -> Any:
    with mode(module, training):
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
    if len(logits) != len(calls[-1].received[0]):
        raise ValueError(f"the backbone returns {len(logits)} rows for 2 images; it must return logits [N, K]")
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


def _trace(backbone: nn.Module, calls: Sequence[_Call], inputs: Sequence[Tensor], names: Sequence[str]) -> _Trace:
    """Traced by torch.fx, or followed from module to module where that is impossible; the last name ends it.

    inputs: batches of different sizes; the backbone was called with the first.
    """
    opened = {"", *(parent for name in names for parent in accumulate(name.split(".")[:-1], "{}.{}".format))}
    try:
        (trained, _), (graph, returned) = (_symbolic(backbone, opened, training) for training in (True, False))
    except Exception as error:  # torch.fx raises whatever the traced code does
        try:
            # A copy, since in training mode the statistics change.
            (trained, _) = _chain(_watch(working_copy(backbone), inputs[0], training=True), opened)
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
    runnable = _module(backbone, whole)
    values = dict(zip(copies, _run(runnable, inputs[0].clone()), strict=True))
    sizes = {node for node, value in values.items() if isinstance(value, int) and _is_first_size(node)}
    for x in inputs:
        found = zip(copies, _run(runnable, x.clone()), strict=True) if sizes else ()
        sizes -= {node for node, value in found if not isinstance(value, int) or value != len(x)}
    batch_size = _shared_batch_size(graph, sizes)
    nodes = list(graph.nodes)
    nodes = nodes[: nodes.index(returned[names[-1]]) + 1]
    return _Trace(backbone, tuple(nodes), returned, values, batch_size)


def _is_first_size(node: fx.Node) -> bool:
    return node.args[1:] == (0,) and len(node.all_input_nodes) == 1


def _shared_batch_size(graph: fx.Graph, sizes: set[fx.Node]) -> fx.Node:
    """One node for all of `x.size(0)` and `x.shape[0]`, which every stage can read from its own features."""
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


def _module(backbone: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """The graph with the modules and parameters that it names."""
    return graph_module(attributes(backbone, graph, {_TRAINING: _TrainingMode()}), graph)


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
    trace: _Trace, source: fx.Node, nodes: Sequence[fx.Node], result: fx.Node, width: int | None = None
) -> fx.Graph:
    """The nodes from `source` to `result`; with a width, [N, width] is returned as [N, width, 1, 1]."""
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
    # A backbone may have squeezed a single image to [width].
    graph.output(out if width is None else graph.call_method("reshape", (out, -1, width, 1, 1)))
    return graph


def _has_weights(trace: _Trace, node: fx.Node) -> bool:
    if node.op == "call_module" and node.target != _TRAINING:
        module = trace.backbone.get_submodule(str(node.target))
        return any(True for _ in chain(module.parameters(), module.buffers()))
    return node.op == "get_attr"


def _final(trace: _Trace, cuts: Sequence[fx.Node], classifier: nn.Linear) -> tuple[fx.Graph, fx.Graph | None]:
    """Last stage, and the pooling of the final exit: the backbone's own, if it is an average at every size.

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
            pool, channels = _stage(trace, node, tail, read), trace.values[node].shape[1]
            runnable = _module(trace.backbone, pool)
            if channels == classifier.in_features and _averages(runnable, trace.values[node]):
                return _stage(trace, source, trace.between(source, node), node), pool
    return _stage(trace, source, rest, read, width=classifier.in_features), None


def _averages(pool: nn.Module, like: Tensor) -> bool:
    """Whether `pool` maps [N, C, H, W] to the mean [N, C]; tried, since there are many ways to write it.

    A window of fixed size averages the maps of one size only, and a squeeze drops the dimension of a single image.
    """
    n, channels, h, w = like.shape
    if like.is_meta:  # tried on the CPU, on maps that take little memory
        h, w = min(h, 16), min(w, 16)
    for shape in ((n, h, w), (1, 2 * h + 1, w + 3), (3, 1, 1), (2, 41, 37)):
        # Large, so that an activation behind the pooling shows, and float64, so that rounding does not.
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(shape[0], channels, *shape[1:], dtype=torch.float64, generator=generator, device="cpu")
        x = 100 * (x if like.is_meta else x.to(like.device))
        try:
            out = _run(pool, x.clone())
        except Exception:  # whatever the backbone raises for maps of another size
            return False
        if out.shape != x.shape[:2] or not torch.allclose(out.double(), x.mean((2, 3)), rtol=0, atol=1e-3):
            return False
    return True


def _separate(stages: list[fx.GraphModule], images: Tensor) -> list[Tensor]:
    """Let stages that would overwrite their features copy them: for its gradients the head before still needs them.

    Returns each stage's features.
    """
    features, found = images.clone(), []
    for i, stage in enumerate(stages):
        before = features._version
        result = _run(stage, features)
        if i and features._version != before:
            source = next(iter(stage.graph.nodes))
            with stage.graph.inserting_after(source):
                own = stage.graph.call_method("clone", (source,))
            source.replace_all_uses_with(own, lambda user, own=own: user is not own)
            recompile(stage)
        found.append(result)
        features = result
    return found


def _check_answers(cut: nn.Module, backbone: nn.Module, answers: Sequence[tuple[Tensor, Tensor]]) -> None:
    """What tracing cannot see, a branch on the images or their size for instance, shows here.

    answers: of the backbone, to batches of different sizes. Both share their weights, which are changed at last: what
    was computed from them while tracing does not follow.
    """

    def check(images: Tensor, expected: Tensor, when: str) -> None:
        try:
            got = _run(cut, images.clone())
        except Exception as error:  # whatever shapes that do not fit raise
            raise ValueError(f"the cut backbone {when} fails ({error}), and the whole one does not; {_SEEN}") from error
        expected = expected.view_as(got) if expected.numel() == got.numel() else expected
        scale = float(expected.abs().nan_to_num(0, 0).max())
        if got.shape != expected.shape or not torch.allclose(
            got, expected, rtol=0.01, atol=0.01 * scale, equal_nan=True
        ):
            off = (
                f"{(got - expected).abs().max():.3g} off"
                if got.shape == expected.shape
                else f"{tuple(got.shape)} beside"
            )
            raise ValueError(f"the cut backbone answers {when} {off} the whole one, {_SEEN}")

    for images, expected in answers:
        check(images, expected, f"to images of {tuple(images.shape[2:])}")
    generator = torch.Generator("cpu").manual_seed(0)
    for t in chain(backbone.parameters(), backbone.buffers()):
        if t.is_floating_point():
            factor = 0.5 + torch.rand(t.shape, generator=generator, device="cpu", dtype=torch.float32).to(t)
            t.copy_(torch.where(t == 0, 0.1 * factor, t * factor))
    images = answers[0][0]
    check(images, _run(backbone, images.clone()), "with other weights")


_SEEN = (
    "so it computes something that torch.fx does not see; build eefast.EarlyExitNet(stages, heads, ...) from its "
    "modules"
)
