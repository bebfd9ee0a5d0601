"""The stages of a network in simulated INT8: features → features in PyTorch, which other libraries run in integers."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from .quantized import REFUSED, KeepsDtypes


class QuantizeDequantize(KeepsDtypes):
    """Values of any shape → the nearest (integer - zero) · scale, integers 0 … 255.

    Buffers: scale float32 [], zero int32 [].
    """

    scale: Tensor
    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int32))

    def forward(self, values: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero, 0, 255)


class QdqConvolution(KeepsDtypes):
    """A convolution whose weights are integers with a scale for each output channel.

    Buffers: weight int8 [O, C ÷ groups, kh, kw], -127 … 127; scale float32 [O]; bias float32 [O].
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        """conv: in float32; without memory for its weights this has none either."""
        super().__init__()
        weight = conv.weight.detach()
        largest = weight.abs().flatten(1).amax(1)
        scale = torch.where(largest > 0, largest, 1.0) / 127
        integers = (weight / scale[:, None, None, None]).round()
        self.register_buffer("weight", integers.to(torch.int8, memory_format=torch.contiguous_format))
        self.register_buffer("scale", scale)
        bias = torch.zeros_like(scale) if conv.bias is None else conv.bias.detach().clone()
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, features: Tensor) -> Tensor:
        weight = self.weight.float() * self.scale[:, None, None, None]
        zeros = torch.zeros_like(self.scale, dtype=torch.int32)
        # Changes nothing here, and tells an exporter that these are integers.
        weight = torch.fake_quantize_per_channel_affine(weight, self.scale, zeros, 0, -128, 127).to(features.dtype)
        bias = self.bias.to(features.dtype)
        return F.conv2d(features, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def extra_repr(self) -> str:
        o, c, *kernel = self.weight.shape
        return f"{c * self.groups}, {o}, kernel={tuple(kernel)}, stride={self.stride}, groups={self.groups}"


def round_nothing(graph: nn.Module) -> None:
    """Let values pass as they are; the weights of convolutions stay integers."""
    for parent in list(graph.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizeDequantize):
                setattr(parent, name, nn.Identity())


class QdqStage(KeepsDtypes):
    """Float features, or images [N, C, H, W] → float features [N, C', H', W'], in the dtype of the former.

    graph: of the stage, whose numbers are all buffers; it is computed in float32.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        for module in graph.modules():
            for name, value in list(module._parameters.items()):
                del module._parameters[name]
                # In the layout of a file, since the order of additions depends on it.
                module.register_buffer(name, None if value is None else value.detach().contiguous())
        self.graph = graph

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (self.training or x.requires_grad):
            raise RuntimeError(REFUSED)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return cast(Tensor, self.graph(x if x.dtype == torch.float64 else x.float())).to(x.dtype)
