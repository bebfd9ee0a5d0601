"""Make inference copies of stages and heads: BatchNorm folded into its neighbour, channels-last, in one dtype."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval

from .heads import ExitHead
from .tracing import Tracer, attributes


def fold_stage(stage: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, str]:
    """An eval copy of `stage` in `dtype` and channels-last, every BatchNorm behind a convolution folded into it.

    Returns the copy and what was done: "folded", or why the copy computes its BatchNorms as they stand.
    """
    stage = copy.deepcopy(stage).eval().requires_grad_(False)
    try:
        folded, what = fuse(_traced(stage.float()), no_trace=True), "folded"
    except Exception as error:  # torch.fx raises whatever the traced code does
        folded, what = stage, f"not folded: torch.fx cannot trace it ({type(error).__name__})"
    # A trained network's float16 weights are folded in float32, so that folding adds one rounding and no more.
    return folded.to(dtype, memory_format=torch.channels_last), what  # type: ignore[call-overload]


def _traced(module: nn.Module) -> fx.GraphModule:
    graph = Tracer().trace(module)
    return fx.GraphModule(attributes(module, graph), graph)


def pack_conv(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Weight [C, C_in, 3, 3] in `dtype` and bias [C] float32 of a head's conv3x3 → BatchNorm → ReLU, BatchNorm folded.

    None where `block` is something else.
    """
    conv, norm, relu = block if isinstance(block, nn.Sequential) and len(block) == 3 else (None, None, None)
    if not (isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU)):
        return None
    fixed = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if fixed != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return None
    conv, norm = copy.deepcopy(conv).float().eval(), copy.deepcopy(norm).float().eval()
    fused = fuse_conv_bn_eval(conv, norm).requires_grad_(False)
    assert fused.bias is not None
    return fused.weight.to(dtype, memory_format=torch.channels_last), fused.bias.clone()


def pack_head(head: ExitHead) -> tuple[Tensor, Tensor]:
    """Weight [K + 1, C] and bias [K + 1], float32, of what `head` does behind its convolutions and its pooling.

    Class rows first, then the confidence row. A "bnpool" head's BatchNorm is affine per channel, so it commutes with
    the pooling and goes into the linear; a "plain" head's columns are reordered from (C, H, W) to channels-last
    (H, W, C).
    """
    weight = torch.cat([head.classifier.weight, head.confidence.weight]).detach().double()
    bias = torch.cat([head.classifier.bias, head.confidence.bias]).detach().double()
    norm = head.norm
    if isinstance(norm, nn.BatchNorm2d):
        statistics = dict(norm.named_buffers())
        scale = norm.weight.detach().double() / torch.sqrt(statistics["running_var"].double() + norm.eps)
        shift = norm.bias.detach().double() - statistics["running_mean"].double() * scale
        weight, bias = weight * scale, bias + weight @ shift
    if head.kind == "plain":
        channels, height, width = head.feature_shape
        weight = weight.view(-1, channels, height, width).permute(0, 2, 3, 1).flatten(1)
    return weight.float().contiguous(), bias.float()
