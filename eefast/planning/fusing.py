"""Put what follows a stage's convolutions into them: folded stage → fused convolutions → the fastest way to run it."""

from __future__ import annotations

import copy
import logging
import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .. import ops
from ..modules.tracing import graph_module, recompile
from .folding import computes_as, fold_stage, inference_copy

ROUNDS = 5

log = logging.getLogger("eefast")


class FusedConv(nn.Module):
    """`act(conv(x) + bias + residual)`, act being ReLU or nothing.

    forward: x [N, C_in, H, W] and the optional residual, which broadcasts to [N, C, H', W'], in the weight's dtype →
    [N, C, H', W']. Channels-last maps stay so. weight and bias are the convolution's own parameters, not copies.

    On CUDA, with ReLU and a residual of the result's shape, cuDNN does it in one kernel: it sums in float32 and rounds
    once. Elsewhere PyTorch rounds behind the convolution with its bias and behind the addition.
    Source: PyTorch's aten/src/ATen/native/cudnn/ConvShared.cpp and Conv_v8.cpp.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.relu = conv.weight, conv.bias, relu
        if relu and conv.bias is None:
            # cuDNN's kernel wants a bias; PyTorch would fill one with zeros at every call.
            self.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding = cast("tuple[int, ...]", conv.padding)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        fits = residual is not None and (residual.shape, residual.dtype) == (self._shape(x), x.dtype)
        if self.relu and _on_cuda(x) and x.dim() == 4 and x.dtype != torch.float64:
            if residual is None:
                return torch.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)
            if fits:
                return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1, self.bias, *geometry)
        out = F.conv2d(x, self.weight, self.bias, *geometry)
        if residual is not None:
            out = out.add_(residual) if fits else out + residual
        return out.relu_() if self.relu else out

    def extra_repr(self) -> str:
        channels, inputs, *kernel = self.weight.shape
        return f"{inputs * self.groups}, {channels}, {tuple(kernel)}, stride={self.stride}, relu={self.relu}"

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        geometry = zip(x.shape[-2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        sides = [(side + 2 * p - d * (k - 1) - 1) // s + 1 for side, k, s, p, d in geometry]
        return (*x.shape[:-3], len(self.weight), *sides)


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def fuse_convolutions(folded: nn.Module) -> tuple[nn.Module, int, int]:
    """A copy of the graph in which every `nn.Conv2d` took over the addition and the ReLU that follow it.

    folded: what `planning.folding.fold_stage` returns. It stays as it is and shares its parameters with the copy; where
    it is no `fx.GraphModule`, it is returned itself. Convolutions with another padding than zeros, or a padding in
    words, stay `nn.Conv2d`.
    Returns the module, the number of fused convolutions and that of all. A convolution counts as fused where it took
    its ReLU or where only fused convolutions or nobody in the stage read it.
    """
    if not isinstance(folded, fx.GraphModule):
        return folded, 0, sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    module = graph_module(folded, copy.deepcopy(folded.graph))
    _drop_identities(module)
    found = [node for node in module.graph.nodes if _is_convolution(module, node)]
    # From the end: of two convolutions that get added the later one takes the addition, the other one's result is there
    # by then; and in-place operations behind later ones are gone, so that they stop nobody.
    for node in reversed(found):
        if _fusible(module, node):
            _fuse(module, node)
    module.delete_all_unused_submodules()
    module.graph.lint()
    recompile(module)
    fused = [node for node in module.graph.nodes if isinstance(_called(module, node), FusedConv)]
    whole = [n for n in fused if _called(module, n).relu or all(u.op == "output" or u in fused for u in n.users)]
    for node in fused:
        _lend_bias(module, node)
    return module, len(whole), len(found)


def _called(module: fx.GraphModule, node: fx.Node) -> Any:
    """The submodule, the function or the name of the method that a node calls; None for inputs, outputs, attributes."""
    if node.op == "call_module":
        return module.get_submodule(cast(str, node.target))
    return node.target if node.op in ("call_function", "call_method") else None


def _drop_identities(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        called = _called(module, node)
        if any(computes_as(called, kind) for kind in _IDENTITIES) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_convolution(module: fx.GraphModule, node: fx.Node) -> bool:
    called = _called(module, node)
    return isinstance(called, nn.Conv2d) or called is F.conv2d


def _fusible(module: fx.GraphModule, node: fx.Node) -> bool:
    conv = _called(module, node)
    plain = computes_as(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and len(node.args) == 1


def _fuse(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a convolution, and the addition and the ReLU that alone read it, by one call."""
    chain, addend, relu = [node], None, False
    follower = _follower(module, chain)
    if follower is not None and (addend := _addend(module, follower, node)) is not None:
        chain.append(follower)
        follower = _follower(module, chain)
    if follower is not None and _is_relu(module, follower):
        chain.append(follower)
        relu = True
    name = f"fused_{node.name}"
    module.add_submodule(name, FusedConv(_called(module, node), relu))
    with module.graph.inserting_after(chain[-1]):
        fused = module.graph.call_module(name, node.args if addend is None else (*node.args, addend))
    chain[-1].replace_all_uses_with(fused)
    for gone in reversed(chain):
        module.graph.erase_node(gone)


def _follower(module: fx.GraphModule, chain: Sequence[fx.Node]) -> fx.Node | None:
    """The only reader of the chain's end, if the whole chain may as well run where that stands.

    It may not where something in between changes a map in place that the convolution reads.
    """
    if len(chain[-1].users) != 1:
        return None
    (reader,) = chain[-1].users
    between = chain[0].next
    while between is not reader:
        if _in_place(module, between) and not _is_private(module, between.args[0]):
            return None
        between = between.next
    return reader


def _is_private(module: fx.GraphModule, value: Any) -> bool:
    """Whether a value lies in memory of its own and is read once, so that nobody notices what becomes of it."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    return any(computes_as(_called(module, value), kind) for kind in _CONVOLUTIONS)


def _addend(module: fx.GraphModule, node: fx.Node, summand: fx.Node) -> fx.Node | None:
    """What a node adds to `summand`; None where it does something else or adds to a value that others see change."""
    if _called(module, node) not in _ADDITIONS or node.kwargs not in ({}, {"alpha": 1}) or len(node.args) != 2:
        return None
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None
    if _in_place(module, node) and not _is_private(module, first):
        return None
    return second if first is summand else first


def _is_relu(module: fx.GraphModule, node: fx.Node) -> bool:
    called = _called(module, node)
    return computes_as(called, nn.ReLU) or (not isinstance(called, nn.Module) and called in _RELUS)


def _in_place(module: fx.GraphModule, node: fx.Node) -> bool:
    called = _called(module, node)
    if called is None or isinstance(called, nn.Module):
        return bool(getattr(called, "inplace", False))
    name = called if isinstance(called, str) else getattr(called, "__name__", "")
    asked = "out" in node.kwargs or node.kwargs.get("inplace", any(a is True for a in node.args))
    return bool(asked) or called in _IN_PLACE_OPERATORS or name.endswith("_")


_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_CONVOLUTIONS = (nn.Conv2d, FusedConv)
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS = (torch.relu, torch.relu_, F.relu, "relu", "relu_")
_IN_PLACE_OPERATORS = (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem)


def _lend_bias(module: fx.GraphModule, node: fx.Node) -> None:
    """Let a convolution that takes the sum with a shortcut add the shortcut's bias too: that saves a pass over it."""
    taker, (source, shortcut) = _called(module, node), (*node.args, None)[:2]
    if not (taker.relu and _is_private(module, shortcut)) or shortcut is source:
        return
    lender = _called(module, cast(fx.Node, shortcut))
    lends = isinstance(lender, FusedConv) and not lender.relu and lender.bias is not None
    if lends and lender.bias.shape == taker.bias.shape:
        taker.bias = nn.Parameter(taker.bias + lender.bias, requires_grad=False)
        lender.bias = None


class IndexedStage(nn.Module):
    """A stage that reads the survivors of its input where they lie; `indexed_stage` makes it.

    forward: features [M, C, H, W], channels-last, rows [R] int32, live [1] int32 → [R, C', H', W'], whose rows i < live
    are the stage's results for features[rows[i]]; what stands behind them is not defined. Without rows they are all
    the features' rows in order. See `ops.indexed_conv`, also
    for the errors raised.
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
        self, x: Tensor, residual: Tensor | None, rows: Tensor | None, residual_through_rows: bool, live: Tensor
    ) -> Tensor:
        return ops.indexed_conv(
            x, self.weight, self.bias, residual, rows, residual_through_rows, live, self.stride, self.relu
        )


def indexed_stage(module: nn.Module) -> tuple[IndexedStage | None, str]:
    """The stage that `fuse_convolutions` made, reading its input through an index; or None and the obstacle.

    module: stays as it is and shares its weights with the indexed stage; biases become float32.
    Convolutions of the input, and its additions to those, go through the rows; all later maps are compacted. An input
    that is added to a later map is compacted first, since the op reads either both through the rows or none.
    """
    obstacle = _indexing_obstacle(module)
    if obstacle:
        return None, f"{obstacle}; gather the survivors with eefast.ops.compact and run the stage on them"
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
            compacted = graph.call_function(_compacted, (features, rows, live))
        features.replace_all_uses_with(compacted, lambda user: user is not compacted)
    for node, *_ in convs:
        source, residual = (*node.args, None)[:2]
        indexed.add_submodule(cast(str, node.target), _IndexedConv(_called(indexed, node)))
        node.args = (source, residual, rows if source is features else None, residual is features, live)
    recompile(indexed)
    return IndexedStage(indexed), ""


def device_counted(stage: nn.Module, dtype: torch.dtype) -> IndexedStage | None:
    """An inference copy of `stage` that reads the number of its rows on the device; None where that is impossible."""
    fused, _, _ = fuse_convolutions(fold_stage(stage, dtype)[0])
    return indexed_stage(fused)[0]


def _compacted(features: Tensor, rows: Tensor | None, live: Tensor) -> Tensor:
    if rows is None:
        return features
    out = torch.empty(
        (len(rows), *features.shape[1:]),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last,
    )
    ops.compact(features, rows, live, out)
    return out


def _indexing_obstacle(module: nn.Module) -> str:
    if not isinstance(module, fx.GraphModule):
        return f"torch.fx cannot trace the stage, {type(module).__name__}"
    if len(module.graph.find_nodes(op="placeholder")) != 1:
        return "the stage takes more than its features"
    for node in module.graph.nodes:
        called = _called(module, node)
        if node.op == "output":
            result = node.args[0]
            if not (isinstance(result, fx.Node) and isinstance(_called(module, result), FusedConv)):
                return f"the stage returns {result}, which is not the result of one of its convolutions"
        elif node.op != "placeholder" and not isinstance(called, FusedConv):
            what = called if isinstance(called, nn.Module | str) else getattr(called, "__name__", node.target)
            return f"the stage has {node.name} = {what}, which the indexed convolution does not take over"
        elif isinstance(called, FusedConv):
            kernel = tuple(called.weight.shape[2:])
            plain = called.padding == (kernel[0] // 2,) * 2 and called.dilation == (1, 1) and called.groups == 1
            if kernel not in ((1, 1), (3, 3)) or called.stride not in ((1, 1), (2, 2)) or not plain:
                return (
                    f"{node.name} is a convolution with kernel {kernel}, stride {called.stride}, padding "
                    f"{called.padding}, dilation {called.dilation} and {called.groups} groups; indexed ones have a "
                    "kernel of 1 or 3, stride 1 or 2, padding kernel // 2, no dilation and one group"
                )
    return ""


def fastest_stage(stage: nn.Module, dtype: torch.dtype, example: Tensor) -> tuple[nn.Module, str]:
    """The fastest inference copy of `stage` in `dtype`, and a note such as "fused (9 of 9 convolutions), 1.4× folded".

    example: [N, C, H, W] features to measure on, on the stage's device; N ≥ 1.
    On CUDA the candidates are the folded stage, its fused convolutions and, where those are not all, torch.compile.
    Before anything is timed, each candidate's features are compared with float64's: an error of more than twice the
    folded stage's leaves it out, and so does an exception; the note says so. On the CPU it is the folded stage:
    fused, it calls the same kernels there.

    Raises `ValueError` where `example` has no rows.
    """
    if len(example) == 0:
        raise ValueError(f"example has shape {list(example.shape)}; pass at least one row of features to measure on")
    folded, what = fold_stage(stage, dtype)
    if not _on_cuda(example):
        return folded, what
    fused, count, total = fuse_convolutions(folded)
    candidates = {what: folded}
    if count:
        candidates[f"fused ({count} of {total} convolutions)"] = fused
    if count < total:
        log.warning("planning tries torch.compile for a stage, %d of whose %d convolutions fuse", count, total)
        candidates["torch.compile"] = cast(nn.Module, torch.compile(folded, dynamic=True))
    exact = inference_copy(stage).to(torch.float64)
    # A copy, since a stage may change its input in place.
    return _fastest(candidates, exact, example.to(dtype, copy=True, memory_format=torch.channels_last))


@torch.no_grad()
def _fastest(candidates: dict[str, nn.Module], exact: nn.Module, features: Tensor) -> tuple[nn.Module, str]:
    """The fastest candidate that is as exact as the first, and the note about it."""
    first, *others = candidates
    try:
        # In parts, since float64 takes four times the memory of float16.
        wanted = torch.cat([exact(part.to(torch.float64, copy=True)) for part in features.split(16)])
    except Exception as problem:  # a stage may know no float64
        return candidates[first], f"{first}; not measured, since float64 fails: {_brief(problem)}"

    def error(candidate: nn.Module) -> float:
        return float((candidate(features.clone()).double() - wanted).abs().max())

    allowed, remarks = 2 * error(candidates[first]), []
    for name in others:
        try:
            found = error(candidates[name])
            reason = "" if found <= allowed else f"its error is {found:.1g}, more than twice that of {first}"
        except Exception as problem:  # cuDNN and torch.compile raise whatever they do
            reason = _brief(problem)
        if reason:
            remarks.append(f"; {name} left out: {reason}")
            del candidates[name]
    seconds = _seconds(list(candidates.values()), features)
    least = min(seconds)
    best = list(candidates)[seconds.index(least)]
    speed = "" if best == first else f", {seconds[0] / least:.1f}× {first}"
    return candidates[best], "".join([best, speed, *remarks])


def _brief(problem: Exception) -> str:
    return f"{type(problem).__name__}: {problem}".partition("\n")[0]


def _seconds(candidates: Sequence[nn.Module], features: Tensor) -> list[float]:
    """Of each candidate, the least over rounds in which all take turns; on CUDA as graphs, since so they will run."""
    runs: list[Callable[[], Any]] = [partial(candidate, features) for candidate in candidates]
    replays = [_captured(run) for run in runs] if features.is_cuda else runs
    least = [float("inf")] * len(runs)
    for _ in range(ROUNDS):
        for i, run in enumerate(replays):
            begin = time.perf_counter()
            run()
            if features.is_cuda:
                torch.cuda.synchronize(features.device)
            least[i] = min(least[i], time.perf_counter() - begin)
    return least


def _captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph, or as it stands where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except Exception:  # whatever the stage does that a capture forbids
        return run
    return graph.replay
