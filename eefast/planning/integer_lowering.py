"""Quantised network → layers of the resident engine on maps of integers, or what in it has no such layer, by name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..ops import Activation, Kind
from ..qdq import QdqStage
from ..quantized import QuantizedAffine, QuantizedConvolution, QuantizedMaxPool, QuantizedStage
from . import layer_passes
from .errors import UnsupportedError
from .head_packing import head_obstacle, pack_head
from .layers import IntegerLayer, Lowered
from .patterns import computes_as


def is_quantized(net: EarlyExitNet) -> bool:
    """Whether any part of the network computes in integers, or as if it did."""
    return any(isinstance(module, QuantizedStage | QdqStage) for module in net.modules())


@torch.no_grad()
def lower_integers(net: EarlyExitNet) -> Lowered:
    """The layers of a quantised network; `UnsupportedError` names the part that is not as `quantize` makes it."""
    values, value = Values(net.input_shape[0]), 0
    for i, (stage, head) in enumerate(zip(net.stages, net.heads, strict=True)):
        if obstacle := head_obstacle(head, i):
            raise UnsupportedError(obstacle)
        assert isinstance(head, ExitHead)
        value = seen = values.append(stage, value, f"stage {i}")
        begin = len(values.layers)
        for convs in head.convs:
            seen = values.append(convs, seen, f"the head of exit {i}")
        for layer in values.layers[begin:]:
            layer.head = True
        if seen == 0:
            raise UnsupportedError(f"exit {i} reads the image itself")
        values.exit(head, seen, i)
    assert values.image is not None
    ordered = layer_passes.order_by_section(values.layers)
    placed = layer_passes.assign_maps(ordered, values.channels, net.input_shape[1:], values.zeros)
    return Lowered(placed.layers, placed.maps, placed.sizes, values.image)


class Values:
    """The layers so far, and channels, scale and zero point of every value; image: multiplier and shift."""

    def __init__(self, image_channels: int) -> None:
        self.layers: list[IntegerLayer] = []
        self.channels, self.scales, self.zeros = [image_channels], [1.0], [0]
        self.image: Tensor | None = None

    def append(self, stage: nn.Module, source: int, where: str) -> int:
        """Append the layers of a stage that reads the value `source`; returns the value that the stage returns.

        where: what error texts call the stage.
        """
        if isinstance(stage, QdqStage):
            raise UnsupportedError(f"{where} is in INT8 with layers that it has no step in integers for")
        if not isinstance(stage, QuantizedStage):
            raise UnsupportedError(f"{where} is a {type(stage).__name__}, not quantised as other parts of the network")
        if not computes_as(stage, QuantizedStage):
            raise UnsupportedError(f"{where} is a {type(stage).__name__} with hooks or another forward")
        scales = stage.scales.tolist()
        if (stage.image is None) == (source == 0):
            raise UnsupportedError(f"{where} takes {'images' if source else 'maps'}, at a place where there are none")
        if stage.image is not None:
            self.image = stage.image.cpu()
        elif (scales[0], stage.zeros[0]) != (self.scales[source], self.zeros[source]):
            raise UnsupportedError(f"{where} takes maps of another scale than it is given; quantise the whole network")
        values = [source]
        for number, step in enumerate(stage.steps, 1):
            layer, channels = self._layer(step, values, where)
            if layer.kind != Kind.CONVOLUTION and layer.source == 0:  # for which there are no other kernels
                raise UnsupportedError(f"{where} has {step} on the image, which the resident engine has no step for")
            layer.target = len(self.channels)
            values.append(layer.target)
            self.layers.append(layer)
            self.channels.append(channels)
            self.scales.append(scales[number])
            self.zeros.append(stage.zeros[number])
        return values[stage.output]

    def _layer(self, step: nn.Module, values: list[int], where: str) -> tuple[IntegerLayer, int]:
        """The layer of a step, without its target, and the channels of that."""
        if isinstance(step, QuantizedConvolution) and computes_as(step, QuantizedConvolution):
            weight, bias, scale, ratio = (part.cpu() for part in (step.weight, step.bias, step.scale, step.ratio))
            residual = values[step.residual] if step.residual >= 0 else -1
            layer = IntegerLayer(
                Kind.CONVOLUTION, values[step.source], -1, residual, Activation(step.relu), step.kernel, step.stride,
                step.padding, weight, bias, scale=scale, ratio=ratio, winograd=step.winograd, row=step.row,
            )  # fmt: skip
            return layer, len(weight)
        if isinstance(step, QuantizedAffine) and computes_as(step, QuantizedAffine):
            source, relu, scale, shift = values[step.source], Activation(step.relu), step.scale.cpu(), step.shift.cpu()
            return IntegerLayer(Kind.AFFINE, source, -1, -1, relu, weight=scale, bias=shift), len(scale)
        if isinstance(step, QuantizedMaxPool) and computes_as(step, QuantizedMaxPool):
            source, window = values[step.source], (step.kernel, step.stride, step.padding)
            pooling = IntegerLayer(Kind.MAX_POOL, source, -1, -1, Activation.NONE, *window, row=step.row)
            return pooling, self.channels[source]
        raise UnsupportedError(f"{where} has {step}, which the resident engine has no step for")

    def exit(self, head: ExitHead, seen: int, number: int) -> None:
        """Append the exit that reads the value `seen`; the value's scale and zero point go into its weights."""
        weight, bias = (part.cpu() for part in pack_head(head))
        scaled = weight.double() * self.scales[seen]
        bias = (bias.double() - self.zeros[seen] * scaled.sum(1)).float()
        flatten = head.kind == "plain"
        rows: Tensor = scaled.float()
        if flatten:
            channels, height, width = head.feature_shape
            rows = rows.view(-1, height, width, channels).permute(0, 3, 1, 2)
        self.layers.append(IntegerLayer(Kind.EXIT, seen, number, kernel=int(flatten), weight=rows, bias=bias))
