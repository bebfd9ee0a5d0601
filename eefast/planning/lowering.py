"""Network → layers of the resident engine, or what in it that engine has no step for, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..ops import Kind
from . import layer_passes
from .errors import UnsupportedError
from .folding import affine, fold_stage
from .head_packing import head_obstacle, pack_head
from .layers import ADDITION, Layer, Lowered
from .patterns import called, computes_as, describe, is_addition, is_identity, is_relu, path_of, writes_in_place


@torch.no_grad()
def lower(net: EarlyExitNet) -> Lowered:
    """The network's layers; raises `UnsupportedError`, naming what the resident engine has no step for."""
    traced = _Trace(net.input_shape[0])
    value = 0
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        if obstacle := head_obstacle(head, i):
            raise UnsupportedError(obstacle)
        assert isinstance(head, ExitHead)
        value = traced.append(stage, value, f"stage {i}")
        seen = traced.append(head.convs, value, f"the head of exit {i}") if len(head.convs) else value
        if seen == 0:
            raise UnsupportedError(f"exit {i} reads the image itself")
        weight, bias = (part.cpu() for part in pack_head(head))
        flatten = head.kind == "plain"
        if flatten:
            channels, height, width = head.feature_shape
            weight = weight.view(-1, height, width, channels).permute(0, 3, 1, 2)
        traced.layers.append(Layer(Kind.EXIT, seen, i, kernel=int(flatten), weight=weight, bias=bias))
    ordered = layer_passes.order_by_section(layer_passes.fuse(traced.layers))
    return layer_passes.assign_maps(ordered, traced.channels, net.input_shape[1:])


@torch.no_grad()
def stage_layers(stage: nn.Module, channels: int, where: str, image: bool) -> tuple[list[Layer], int]:
    """One module alone → its layers, fused, and the value that it returns; layer i writes value i + 1, 0 is the input.

    channels: of the input. where: what error texts call the module. image: whether the input is the image.
    Raises `UnsupportedError` as `lower`; its `path` names the module inside of `stage`, where one is to blame.
    """
    traced = _Trace(channels)
    if not image:
        traced.channels.append(channels)  # value 0 would be taken for the image
    source = len(traced.channels) - 1
    output = traced.append(stage, source, where)
    # What reads the stage's output: without it a ReLU inside of the stage could become part of that.
    reader = Layer(Kind.EXIT, output, 0)
    layers = layer_passes.fuse([*traced.layers, reader])[:-1]
    number = {-1: -1, source: 0, **{layer.target: i + 1 for i, layer in enumerate(layers)}}
    for layer in layers:
        layer.source, layer.residual, layer.target = (number[v] for v in (layer.source, layer.residual, layer.target))
    return layers, number[output]


class _Trace:
    """The layers of traced modules so far, and the channels of every value."""

    def __init__(self, image_channels: int) -> None:
        self.layers: list[Layer] = []
        self.channels = [image_channels]

    def append(self, module: nn.Module, source: int, where: str) -> int:
        """Append the layers of a module that reads the value `source`; returns the value that the module returns.

        where: what error texts call the module.
        """
        folded, what = fold_stage(module, torch.float32)
        folded = folded.cpu()
        if not isinstance(folded, fx.GraphModule):
            raise UnsupportedError(f"{where} is {what}")
        values: dict[fx.Node, int] = {}
        for node in folded.graph.nodes:
            if node.op == "placeholder":
                values[node] = source
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise UnsupportedError(f"{where} returns more than one map")
                return values[node.args[0]]
            elif node.op == "get_attr":
                raise UnsupportedError(f"{where} computes with {node.target}, {_NO_STEP}")
            elif set(node.kwargs) - {"inplace"}:
                raise UnsupportedError(f"{where} has {describe(folded, node)} with {', '.join(node.kwargs)}")
            else:
                sources = [values[a] for a in node.args if isinstance(a, fx.Node)]
                try:
                    values[node] = self._call(folded, node, sources, where)
                except UnsupportedError as error:
                    raise error.at(path_of(node)) from None
                if writes_in_place(folded, node):
                    # Later readers of the same tensor, by whichever name, see what was written.
                    before = values[node.args[0]]
                    values.update({other: values[node] for other, value in values.items() if value == before})
        raise AssertionError("a graph ends with an output")

    def _call(self, module: fx.GraphModule, node: fx.Node, sources: list[int], where: str) -> int:
        """Append the layer of one call that reads `sources`; returns its value."""
        layer = called(module, node)
        if is_addition(layer) and len(sources) == 2:
            first, second = sources
            if self.channels[first] != self.channels[second]:
                raise UnsupportedError(f"{where} adds maps of different channels")
            return self._add(Layer(ADDITION, first, -1, residual=second), self.channels[first])
        unsupported = UnsupportedError(f"{where} has {describe(module, node)}, {_NO_STEP}")
        if len(sources) != 1:
            raise unsupported
        (source,) = sources
        if is_identity(layer):
            return source
        if computes_as(layer, nn.Conv2d):
            return self._convolution(layer, source, where)
        if source == 0:  # the image, for which there are no other kernels
            raise unsupported
        channels = self.channels[source]
        if is_relu(layer):
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            return self._add(Layer(Kind.AFFINE, source, -1, relu=True, weight=ones, bias=zeros), channels)
        if computes_as(layer, nn.BatchNorm2d) and layer.running_var is not None:
            scale, shift = affine(layer)
            return self._add(Layer(Kind.AFFINE, source, -1, weight=scale.float(), bias=shift.float()), channels)
        if computes_as(layer, nn.MaxPool2d) and (window := _window(layer)):
            kernel, stride, padding = window
            pooling = Layer(Kind.MAX_POOL, source, -1, kernel=kernel, stride=stride, padding=padding)
            return self._add(pooling, channels)
        raise unsupported

    def _convolution(self, conv: nn.Conv2d, source: int, where: str) -> int:
        kernel, stride = _both(conv.kernel_size), _both(conv.stride)
        padding = 0 if conv.padding == "valid" else _both(conv.padding)
        square = kernel is not None and padding is not None and padding <= kernel
        plain = conv.groups == 1 and _both(conv.dilation) == 1 and conv.padding_mode == "zeros"
        if not (square and plain and stride in (1, 2)):
            raise UnsupportedError(
                f"{where} has {conv}; the resident engine has no grouped, dilated or larger-stride one"
            )
        bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)
        layer = Layer(
            Kind.CONVOLUTION, source, -1, kernel=kernel, stride=stride, padding=padding, weight=conv.weight, bias=bias
        )
        return self._add(layer, conv.out_channels)

    def _add(self, layer: Layer, channels: int) -> int:
        """Append a layer that writes the next value, of `channels` channels; returns that value."""
        layer.target = len(self.channels)
        self.channels.append(channels)
        self.layers.append(layer)
        return layer.target


_NO_STEP = "which the resident engine has no step for"


def _window(pool: nn.MaxPool2d) -> tuple[int, int, int] | None:
    """Kernel, stride and padding of a max pooling; None where the resident engine has no such pooling."""
    stride = pool.stride if pool.stride is not None else pool.kernel_size
    kernel, stride, padding = _both(pool.kernel_size), _both(stride), _both(pool.padding)
    if None in (kernel, stride, padding) or _both(pool.dilation) != 1 or pool.ceil_mode or pool.return_indices:
        return None
    return kernel, stride, padding


def _both(value: Any) -> Any:
    """The number that holds for height and width; None where they differ or are no numbers."""
    pair = value if isinstance(value, tuple) else (value, value)
    return pair[0] if isinstance(pair[0], int) and pair[0] == pair[-1] else None
