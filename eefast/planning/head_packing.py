"""Exit head → weights of its last convolution and of one linear for the exit kernels, or why that is impossible."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..heads import ExitHead
from .folding import affine, fold_pair, has_statistics_for
from .inference_copies import inference_copy
from .patterns import computes_as


def pack_conv(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Weight [C, C_in, 3, 3] in `dtype` and bias [C] float32 of a head's conv3x3 → BatchNorm → ReLU, BatchNorm folded.

    block: the module to pack; None is returned where it is something else.
    """
    block = inference_copy(block)
    conv, norm, relu = block if isinstance(block, nn.Sequential) and len(block) == 3 else (None, None, None)
    parts = (block, nn.Sequential), (conv, nn.Conv2d), (norm, nn.BatchNorm2d), (relu, nn.ReLU)
    if not all(computes_as(module, kind) for module, kind in parts) or not has_statistics_for(conv, norm):
        return None
    conv = cast(nn.Conv2d, conv)
    fixed = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)
    if fixed != ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"):
        return None
    fused = fold_pair(conv.float(), cast(nn.BatchNorm2d, norm))
    assert fused.bias is not None
    return fused.weight.to(dtype, memory_format=torch.channels_last), fused.bias.clone()


def head_obstacle(head: nn.Module, number: int) -> str:
    """Why the head of exit `number` cannot be packed: what `pack_head` would get wrong, part by part; "" if it can.

    An `ExitHead` may have another pooling that is the mean at every size, BatchNorm or nothing as norm, linears without
    a bias, and convolutions of any kind.
    """
    where = f"the head of exit {number}"
    if type(head) is not ExitHead:
        return f"{where} is a {type(head).__name__}, not an eefast.heads.ExitHead"
    if not computes_as(head, ExitHead):
        return f"{where} has another forward or hooks"
    head = inference_copy(head)
    assert isinstance(head, ExitHead)
    if not computes_as(head.convs, nn.Sequential):
        return f"{where} has {_brief(head.convs)} as convs, not nn.Sequential"
    if not (computes_as(head.norm, nn.Identity) or computes_as(head.norm, nn.BatchNorm2d)):
        return f"{where} has {_brief(head.norm)} as norm, not nn.Identity or nn.BatchNorm2d"
    if isinstance(head.norm, nn.BatchNorm2d) and head.norm.running_var is None:
        return f"{where} has a BatchNorm without running statistics as norm"
    for name in ("classifier", "confidence"):
        linear = getattr(head, name)
        if not _is_linear(linear):
            return f"{where} has {_brief(linear)} as {name}, not nn.Linear"
        if linear.weight.shape[1] != head.num_features:
            return f"{where} has a {name} for {linear.weight.shape[1]} features, not {head.num_features}"
    if len(head.confidence.weight) != 1:
        return f"{where} has {len(head.confidence.weight)} rows as confidence, not 1"
    return "" if _pools(head) else f"{where} has {_brief(head.pool)} as pool, not what head={head.kind!r} has"


def _brief(module: Any) -> str:
    return f"{module}".partition("\n")[0].rstrip("(") if isinstance(module, nn.Module) else type(module).__name__


@torch.no_grad()
def _is_linear(linear: Any) -> bool:
    """Whether a module computes as `nn.Linear`; tried where it is a subclass with another forward, as timm's."""
    if computes_as(linear, nn.Linear) or not isinstance(linear, nn.Linear):
        return isinstance(linear, nn.Linear)
    x = torch.randn(2, linear.weight.shape[1], generator=torch.Generator().manual_seed(0)).to(linear.weight)
    try:
        out = linear(x)
    except Exception:  # it takes something else
        return False
    expected = nn.functional.linear(x, linear.weight, linear.bias)
    return out.shape == expected.shape and torch.allclose(out, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def _pools(head: ExitHead) -> bool:
    """Whether the pooling flattens or averages its maps; tried at two sizes, since there are many ways to write it."""
    channels, height, width = head.feature_shape
    plain = head.kind == "plain"
    for size in [(height, width)] if plain else [(height, width), (height + 3, width + 2)]:
        x = 100 * torch.randn(2, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        try:
            out = head.pool(x.clone())
        except Exception:  # a pooling for one size, for instance
            return False
        expected = x.flatten(1) if plain else x.mean((2, 3))
        if out.shape != expected.shape or not torch.allclose(out.double(), expected, rtol=0, atol=1e-3):
            return False
    return True


def pack_head(head: ExitHead) -> tuple[Tensor, Tensor]:
    """Weight [K + 1, C] and bias [K + 1], float32, of what `head` computes after its convolutions and its pooling.

    Class rows first, then the confidence row. A "bnpool" head's BatchNorm is affine per channel, so it commutes with
    the pooling and goes into the linear; a "plain" head's columns are reordered from (C, H, W) to channels-last
    (H, W, C).
    """
    head = cast(ExitHead, inference_copy(head))
    linears = head.classifier, head.confidence
    weight = torch.cat([part.weight for part in linears]).double()
    zeros = (part.weight.new_zeros(len(part.weight)) for part in linears)
    bias = torch.cat([z if part.bias is None else part.bias for part, z in zip(linears, zeros, strict=True)]).double()
    channels, height, width = head.feature_shape
    if isinstance(head.norm, nn.BatchNorm2d):
        scale, shift = (part.repeat_interleave(weight.shape[1] // channels) for part in affine(head.norm))
        weight, bias = weight * scale, bias + weight @ shift
    if head.kind == "plain":
        weight = weight.view(-1, channels, height, width).permute(0, 2, 3, 1).flatten(1)
    return weight.float().contiguous(), bias.float()
