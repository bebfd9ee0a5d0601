"""Folded stage → the same with fused convolutions, which also compute the addition and the ReLU that follow them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..modules.tracing import graph_module, recompile
from .patterns import called, computes_as, is_addition, is_identity, is_relu, writes_in_place


class FusedConv(nn.Module):
    """`act(conv(x) + bias + residual)`, act being ReLU or nothing.

    forward: x [N, C_in, H, W] and the optional residual, which broadcasts to [N, C, H', W'], in the weight's dtype →
    [N, C, H', W']. Channels-last maps stay so. weight and bias are the convolution's own parameters, not copies.

    On CUDA, with ReLU and a residual of the result's shape, cuDNN does it in one kernel, unless `in_one_kernel` is set
    to False: it sums in float32 and rounds once. Elsewhere PyTorch rounds after the convolution with its bias and after
    the addition.
    Source: PyTorch's aten/src/ATen/native/cudnn/ConvShared.cpp and Conv_v8.cpp.
    """

    def __init__(self, conv: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.relu, self.in_one_kernel = conv.weight, conv.bias, relu, True
        if relu and conv.bias is None:
            # cuDNN's kernel wants a bias; PyTorch would fill one with zeros at every call.
            self.bias = nn.Parameter(conv.weight.new_zeros(conv.out_channels), requires_grad=False)
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding = cast("tuple[int, ...]", conv.padding)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        fits = residual is not None and (residual.shape, residual.dtype) == (self._shape(x), x.dtype)
        if self.in_one_kernel and self.relu and on_cuda(x) and x.dim() == 4 and x.dtype != torch.float64:
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


def on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def fuse_convolutions(folded: nn.Module) -> tuple[nn.Module, int, int]:
    """A copy of the graph in which every `nn.Conv2d` also computes the addition and the ReLU that follow it.

    folded: what `planning.folding.fold_stage` returns. It is not changed and shares its parameters with the copy; where
    it is no `fx.GraphModule`, it is returned itself. Convolutions with another padding than zeros, or a padding in
    words, stay `nn.Conv2d`.
    Returns the module, the number of fused convolutions and that of all. A convolution counts as fused where it
    computes its ReLU, or where nothing but fused convolutions and the stage's output read it.
    """
    if not isinstance(folded, fx.GraphModule):
        return folded, 0, sum(isinstance(m, nn.Conv2d) for m in folded.modules())
    module = graph_module(folded, copy.deepcopy(folded.graph))
    _drop_identities(module)
    found = [node for node in module.graph.nodes if _is_convolution(module, node)]
    # From the end: the later of two convolutions that are added computes the addition, since it can read the earlier
    # one's result; and the in-place operations after later ones are gone then, so that they block no fusion.
    for node in reversed(found):
        if _is_fusible(module, node):
            _fuse(module, node)
    module.delete_all_unused_submodules()
    module.graph.lint()
    recompile(module)
    fused = [node for node in module.graph.nodes if isinstance(called(module, node), FusedConv)]
    whole = [n for n in fused if called(module, n).relu or all(u.op == "output" or u in fused for u in n.users)]
    for node in fused:
        _move_shortcut_bias(module, node)
    return module, len(whole), len(found)


def _drop_identities(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        if is_identity(called(module, node)) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_convolution(module: fx.GraphModule, node: fx.Node) -> bool:
    found = called(module, node)
    return isinstance(found, nn.Conv2d) or found is F.conv2d


def _is_fusible(module: fx.GraphModule, node: fx.Node) -> bool:
    conv = called(module, node)
    plain = computes_as(conv, nn.Conv2d) and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return plain and len(node.args) == 1


def _fuse(module: fx.GraphModule, node: fx.Node) -> None:
    """Replace a convolution, with the addition and the ReLU that are its only readers, by one call."""
    chain, addend, relu = [node], None, False
    follower = _follower(module, chain)
    if follower is not None and (addend := _addend(module, follower, node)) is not None:
        chain.append(follower)
        follower = _follower(module, chain)
    if follower is not None and is_relu(called(module, follower)):
        chain.append(follower)
        relu = True
    name = f"fused_{node.name}"
    module.add_submodule(name, FusedConv(called(module, node), relu))
    with module.graph.inserting_after(chain[-1]):
        fused = module.graph.call_module(name, node.args if addend is None else (*node.args, addend))
    chain[-1].replace_all_uses_with(fused)
    for gone in reversed(chain):
        module.graph.erase_node(gone)


def _follower(module: fx.GraphModule, chain: Sequence[fx.Node]) -> fx.Node | None:
    """The only reader of the chain's end, if the whole chain may run as late as that reader does.

    It may not where something in between changes, in place, a map that the convolution reads.
    """
    if len(chain[-1].users) != 1:
        return None
    (reader,) = chain[-1].users
    between = chain[0].next
    while between is not reader:
        if writes_in_place(module, between) and not _is_private(module, between.args[0]):
            return None
        between = between.next
    return reader


def _is_private(module: fx.GraphModule, value: Any) -> bool:
    """Whether a value is the result of a convolution with one reader, so that no other reader sees it change."""
    if not isinstance(value, fx.Node) or len(value.users) != 1:
        return False
    return computes_as(called(module, value), nn.Conv2d, FusedConv)


def _addend(module: fx.GraphModule, node: fx.Node, summand: fx.Node) -> fx.Node | None:
    """What a node adds to `summand`; None where it does something else or changes a value that others read."""
    if not is_addition(called(module, node)) or node.kwargs not in ({}, {"alpha": 1}) or len(node.args) != 2:
        return None
    first, second = node.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None
    if writes_in_place(module, node) and not _is_private(module, first):
        return None
    return second if first is summand else first


def _move_shortcut_bias(module: fx.GraphModule, node: fx.Node) -> None:
    """Add the bias of a convolution on the shortcut in the convolution that adds the shortcut, which saves a pass."""
    if len(node.args) < 2 or node.args[1] is node.args[0] or not _is_private(module, node.args[1]):
        return
    main, shortcut = called(module, node), called(module, cast(fx.Node, node.args[1]))
    moves = main.relu and isinstance(shortcut, FusedConv) and not shortcut.relu and shortcut.bias is not None
    if moves and shortcut.bias.shape == main.bias.shape:
        main.bias = nn.Parameter(main.bias + shortcut.bias, requires_grad=False)
        shortcut.bias = None
