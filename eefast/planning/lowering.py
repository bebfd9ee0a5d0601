"""Network → layers of the resident engine, or what in it that engine has no step for, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..carrying import JoinedStage
from ..heads import ExitHead
from ..model import EarlyExitNet
from ..ops import Activation, Kind
from . import layer_passes
from .errors import UnsupportedError
from .folding import affine, fold_stage
from .head_packing import head_obstacle, pack_head
from .inference_copies import plain_norms
from .layers import ADDITION, Layer, Lowered
from .patterns import (
    activation_of,
    called,
    computes_as,
    describe,
    is_addition,
    is_flattening,
    is_identity,
    is_join,
    is_mean,
    is_multiplication,
    is_switched_off,
    path_of,
    writes_in_place,
)


@torch.no_grad()
def lower(net: EarlyExitNet, every_step: bool = True) -> Lowered:
    """The network's layers; raises `UnsupportedError`, naming what the resident engine has no step for.

    every_step: whether to use all steps of the engine for the CPU in float32 and bfloat16; else only those that CUDA
        and INT8 have, too: convolutions of one group, affine maps, ReLU, max pooling.
    """
    try:
        return _lower(net, every_step)
    except UnsupportedError as error:
        raise (UnsupportedError(f"{error} (at {error.path})").at(error.path) if error.path else error) from None


def _lower(net: EarlyExitNet, every_step: bool) -> Lowered:
    traced = _Trace(net.input_shape[0], every_step)
    value = 0
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        if obstacle := head_obstacle(head, i):
            raise UnsupportedError(obstacle)
        assert isinstance(head, ExitHead)
        if isinstance(stage, JoinedStage):
            value = traced.append_joined(stage, value, f"stage {i}")
        else:
            value = traced.append(stage, value, f"stage {i}")
        begin = len(traced.layers)
        seen = traced.append(head.convs, value, f"the head of exit {i}") if len(head.convs) else value
        if len(head.convs) and traced.overwrites:
            raise UnsupportedError(f"the head of exit {i} writes over the features, which the next stage reads")
        for layer in traced.layers[begin:] if every_step else ():
            layer.head = True
        if seen == 0:
            raise UnsupportedError(f"exit {i} reads the image itself")
        weight, bias = (part.cpu() for part in pack_head(head))
        flatten = head.kind == "plain"
        if flatten:
            channels, height, width = head.feature_shape
            weight = weight.view(-1, height, width, channels).permute(0, 3, 1, 2)
        traced.layers.append(Layer(Kind.EXIT, seen, i, kernel=int(flatten), weight=weight, bias=bias))
    fused = layer_passes.fuse(traced.layers, traced.channels if every_step else None)
    ordered = layer_passes.order_by_section(layer_passes.extend_joins(fused, traced.channels))
    return layer_passes.assign_maps(ordered, traced.channels, net.input_shape[1:], pooled=traced.pooled)


@torch.no_grad()
def stage_layers(stage: nn.Module, channels: int, where: str, image: bool, head: bool) -> tuple[list[Layer], int]:
    """One module alone → its layers, fused, and the value that it returns; layer i writes value i + 1, 0 is the input.

    channels: of the input. where: what error texts call the module. image: whether the input is the image.
    head: whether it is a head's, whose grouped convolutions become those of one group, most weights 0: they are small.
    The steps are those that INT8 has. Raises `UnsupportedError` as `lower`; its `path` names the module inside of
    `stage`, where one is to blame.
    """
    traced = _Trace(channels, every_step=False, rows=True, ungroups=head)
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
    """The layers of traced modules so far, the channels of every value, and which values are maps of one pixel.

    overwrites: whether the module appended last writes over what it reads.
    """

    def __init__(self, image_channels: int, every_step: bool, rows: bool | None = None, ungroups: bool = False) -> None:
        """rows: whether there are windows of one row, as many as there are of other steps if None."""
        self.rows, self.ungroups = every_step if rows is None else rows, ungroups
        self.layers: list[Layer] = []
        self.channels = [image_channels]
        self.pooled: set[int] = set()
        self.every_step = every_step
        self.overwrites = False

    def append(self, module: nn.Module, source: int, where: str) -> int:
        """Append the layers of a module that reads the value `source`; returns the value that the module returns.

        where: what error texts call the module.
        """
        folded, what = fold_stage(plain_norms(module) if self.every_step else module, torch.float32)
        folded = folded.cpu()
        if not isinstance(folded, fx.GraphModule):
            raise UnsupportedError(f"{where} is {what}")
        values: dict[fx.Node, int] = {}
        self.overwrites = False
        for node in folded.graph.nodes:
            if node.op == "placeholder":
                values[node] = source
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise UnsupportedError(f"{where} returns more than one map")
                return values[node.args[0]]
            elif node.op == "get_attr":
                raise UnsupportedError(f"{where} computes with {node.target}, {_NO_STEP}")
            else:
                sources = [values[a] for a in node.all_input_nodes]
                try:
                    values[node] = self._call(folded, node, sources, where)
                except UnsupportedError as error:
                    raise error.at(path_of(node)) from None
                if writes_in_place(folded, node):
                    # Later readers of the same tensor, by whichever name, see what was written.
                    before = values[node.args[0]]
                    self.overwrites |= before == source
                    values.update({other: values[node] for other, value in values.items() if value == before})
        raise AssertionError("a graph ends with an output")

    def append_joined(self, stage: JoinedStage, source: int, where: str) -> int:
        """As `append`; the pooled features of the exit before go from section to section, to where the others are."""
        if not self.every_step:
            raise UnsupportedError(f"{where} joins the features of the exit before, {_NO_STEP} here")
        begin = len(self.layers)
        early = self.append(nn.Sequential(stage.early_convs, stage.early_norm, stage.pool), source, where)
        for layer in self.layers[begin:]:
            layer.head = True
        begin = len(self.layers)
        last = self.append(nn.Sequential(stage.stage, stage.pool), source, where)
        sections = {source: 0}
        for layer in self.layers[begin:]:
            sections[layer.target] = sections.get(layer.source, 0) + layer.resizes
        channels = self.channels[early]
        for _ in range(sections[last]):
            moving = Layer(
                Kind.AFFINE, early, -1, weight=torch.ones(channels), bias=torch.zeros(channels), moves=True
            )  # fmt: skip
            early = self._add(moving, channels, pooled=True)
        return self._joined([last, early], pooled=True)

    def _call(self, module: fx.GraphModule, node: fx.Node, sources: list[int], where: str) -> int:
        """Append the layer of one call that reads `sources`; returns its value."""
        layer = called(module, node)
        if self.every_step and (found := self._new_call(layer, node, sources, where)) is not None:
            return found
        if set(node.kwargs) - {"inplace"}:
            raise UnsupportedError(f"{where} has {describe(module, node)} with {', '.join(node.kwargs)}")
        if is_addition(layer) and len(sources) == 2 == len(node.args):
            first, second = sources
            if self.channels[first] != self.channels[second]:
                raise UnsupportedError(f"{where} adds maps of different channels")
            if (first in self.pooled) != (second in self.pooled):
                raise UnsupportedError(f"{where} adds maps of different sizes")
            return self._add(Layer(ADDITION, first, -1, residual=second), self.channels[first], first in self.pooled)
        unsupported = UnsupportedError(f"{where} has {describe(module, node)}, {_NO_STEP}")
        if len(sources) != 1 or not (node.args and isinstance(node.args[0], fx.Node)):
            raise unsupported
        (source,) = sources
        if is_identity(layer):
            return source
        pooled = source in self.pooled
        if computes_as(layer, nn.Conv2d):
            return self._convolution(layer, source, where)
        if source == 0:  # the image, for which there are no other kernels
            raise unsupported
        channels = self.channels[source]
        activation = activation_of(layer)
        if activation == Activation.RELU or (activation is not None and self.every_step):
            ones, zeros = torch.ones(channels), torch.zeros(channels)
            activating = Layer(Kind.AFFINE, source, -1, activation=activation, weight=ones, bias=zeros)
            return self._add(activating, channels, pooled)
        if computes_as(layer, nn.BatchNorm2d) and layer.running_var is not None:
            scale, shift = affine(layer)
            norm = Layer(Kind.AFFINE, source, -1, weight=scale.float(), bias=shift.float())
            return self._add(norm, channels, pooled)
        if computes_as(layer, nn.MaxPool2d) and (window := _window(layer)) and not pooled:
            if layer.dilation not in (1, (1, 1)) or layer.return_indices:
                raise unsupported
            kernel, stride, padding, row = window
            if row and not self.rows:
                raise unsupported
            pooling = Layer(Kind.MAX_POOL, source, -1, kernel=kernel, stride=stride, padding=padding, row=row)
            return self._add(pooling, channels)
        raise unsupported

    def _new_call(self, layer: Any, node: fx.Node, sources: list[int], where: str) -> int | None:
        """As `_call`, of what only the CPU has steps for; None: it is none of them."""
        if is_join(layer):
            return self._join(node, sources, where)
        if is_multiplication(layer) and len(sources) == 2 and not node.kwargs and 0 not in sources:
            gate, source = sorted(sources, key=lambda value: value not in self.pooled)
            if gate not in self.pooled or self.channels[gate] != self.channels[source]:
                return None
            return self._add(Layer(Kind.SCALE, source, -1, residual=gate), self.channels[source], source in self.pooled)
        if len(sources) != 1 or sources[0] == 0 or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        (source,) = sources
        channels, pooled = self.channels[source], source in self.pooled
        names = ("output_size",) if layer is F.adaptive_avg_pool2d else ("dim", "keepdim")
        if is_switched_off(layer, node.args[1:], node.kwargs):
            return source
        if is_mean(layer, {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}):
            if pooled:
                return source
            return self._add(Layer(Kind.MEAN, source, -1), channels, pooled=True)
        if pooled and is_flattening(layer):
            wanted = [part for a in node.args[1:] for part in (a if isinstance(a, tuple | list) else (a,))]
            if computes_as(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1):
                return source
            flat = layer in (torch.flatten, "flatten") and wanted == [1]
            return source if flat or wanted in ([-1, channels], [-1, channels, 1, 1]) else None
        if pooled and computes_as(layer, nn.Linear):
            weight = layer.weight[:, :, None, None]
            bias = layer.bias if layer.bias is not None else torch.zeros(len(weight))
            linear = Layer(Kind.CONVOLUTION, source, -1, kernel=1, weight=weight, bias=bias)
            return self._add(linear, len(weight), pooled=True)
        if computes_as(layer, nn.AvgPool2d) and not pooled and (window := _window(layer)):
            kernel, stride, padding, row = window
            if layer.divisor_override is not None or (padding and not layer.count_include_pad) or stride > 2:
                return None
            rows = 1 if row else kernel
            weight = torch.full((channels, 1, rows, kernel), 1 / (rows * kernel), dtype=torch.float32)
            averaging = Layer(
                Kind.CONVOLUTION, source, -1, kernel=kernel, stride=stride, padding=padding, weight=weight,
                bias=torch.zeros(channels), groups=channels, row=row,
            )  # fmt: skip
            return self._add(averaging, channels)
        return None

    def _join(self, node: fx.Node, sources: list[int], where: str) -> int:
        """Append the layers of a concatenation; `sources` has every value once."""
        joined = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(joined, list | tuple) or dim not in (1, -3) or 0 in sources:
            raise UnsupportedError(f"{where} has a concatenation of the image or of something else than channels")
        numbers = dict(zip(node.all_input_nodes, sources, strict=True))
        values = [numbers[part] for part in joined if isinstance(part, fx.Node)]
        if len(values) != len(joined) or any(value in self.pooled for value in values):
            raise UnsupportedError(f"{where} has a concatenation of something else than maps")
        if len(values) == 1:
            return values[0]
        return self._joined(values)

    def _joined(self, values: Sequence[int], pooled: bool = False) -> int:
        """Append the layers that join the channels of maps of one size; returns the value that they make."""
        total, channel, target = sum(self.channels[value] for value in values), 0, -1
        for value in values:
            target = self._add(Layer(Kind.JOIN, value, -1, residual=target, channel=channel), total, pooled)
            channel += self.channels[value]
        return target

    def _convolution(self, conv: nn.Conv2d, source: int, where: str) -> int:
        kernel, padding, row = _window_of(conv.kernel_size, 0 if conv.padding == "valid" else conv.padding)
        stride = _both(conv.stride)
        fits = kernel is not None and padding is not None and padding <= kernel and (self.rows or not row)
        plain = _both(conv.dilation) == 1 and conv.padding_mode == "zeros"
        grouped = conv.groups > 1 and not self.ungroups
        if not (fits and plain and stride in (1, 2)) or (grouped and (source == 0 or not self.every_step)):
            raise UnsupportedError(
                f"{where} has {conv}; the resident engine has no grouped, dilated or larger-stride one"
                + " of the image" * (grouped and source == 0)
            )
        pooled = source in self.pooled
        if pooled and (kernel, stride, padding) != (1, 1, 0):
            raise UnsupportedError(f"{where} has {conv} of a map of one pixel, {_NO_STEP}")
        bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)
        weight, groups = (_of_one_group(conv), 1) if self.ungroups else (conv.weight, conv.groups)
        layer = Layer(
            Kind.CONVOLUTION, source, -1, kernel=kernel, stride=stride, padding=padding, weight=weight, bias=bias,
            groups=groups, row=row,
        )  # fmt: skip
        return self._add(layer, conv.out_channels, pooled)

    def _add(self, layer: Layer, channels: int, pooled: bool = False) -> int:
        """Append a layer that writes the next value, of `channels` channels; returns that value."""
        layer.target = len(self.channels)
        self.channels.append(channels)
        if pooled:
            self.pooled.add(layer.target)
        self.layers.append(layer)
        return layer.target


def _of_one_group(conv: nn.Conv2d) -> torch.Tensor:
    """The weight [O, C, k, k] with which a convolution of one group computes the same."""
    weight, inputs = conv.weight, conv.in_channels // conv.groups
    found = weight.new_zeros(conv.out_channels, conv.in_channels, *weight.shape[2:])
    for o, rows in enumerate(weight):
        begin = o // (conv.out_channels // conv.groups) * inputs
        found[o, begin : begin + inputs] = rows
    return found


_NO_STEP = "which the resident engine has no step for"


def _window(pool: nn.MaxPool2d | nn.AvgPool2d) -> tuple[int, int, int, bool] | None:
    """Kernel, stride and padding of a pooling, and whether it is one row high; None where there is no step for it."""
    stride = pool.stride if pool.stride is not None else pool.kernel_size
    (kernel, padding, row), stride = _window_of(pool.kernel_size, pool.padding), _both(stride)
    if None in (kernel, stride, padding) or pool.ceil_mode:
        return None
    return kernel, stride, padding, row


def _window_of(kernel: Any, padding: Any) -> tuple[Any, Any, bool]:
    """Kernel and padding of a square window, or of one that is one row high and pads no rows, and whether it is that.

    None where the resident engine has no such window.
    """
    kernels, paddings = (value if isinstance(value, tuple) else (value, value) for value in (kernel, padding))
    row = kernels[0] == 1 != kernels[-1] and paddings[0] == 0 and isinstance(kernels[-1], int)
    return (kernels[-1], paddings[-1], True) if row else (_both(kernel), _both(padding), False)


def _both(value: Any) -> Any:
    """The number that holds for height and width; None where they differ or are no numbers."""
    pair = value if isinstance(value, tuple) else (value, value)
    return pair[0] if isinstance(pair[0], int) and pair[0] == pair[-1] else None
