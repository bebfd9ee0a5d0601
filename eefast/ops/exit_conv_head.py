"""One exit whose head begins with a convolution: conv3x3, ReLU, then as `exit_head`, in one launch on GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import criteria
from .checks import check_apart, check_fake, check_range_on_cuda, check_stored, check_traced, refuse_gradient
from .exit_head import check as check_exit_head
from .exit_head import check_classes_on_cuda
from .exit_head import fake as fake_exit_head
from .exit_head import reference as exit_head_reference
from .library import define, namespace
from .on_cuda import implement_on_cuda

define(
    "exit_conv_head(Tensor features, Tensor conv_weight, Tensor conv_bias, Tensor weight, Tensor bias,"
    " Tensor? threshold, Tensor rows, Tensor positions, Tensor live, str criterion, int exit_index,"
    " Tensor(a!) logits, Tensor(b!) confidence, Tensor(c!) exits, Tensor? rule=None)"
    " -> (Tensor, Tensor, Tensor)"
)


def reference(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`exit_conv_head` in plain PyTorch: its oracle, its fallback and its documentation."""
    check(
        features, conv_weight, conv_bias, weight, bias, threshold, rows, positions, live, logits, confidence, exits,
        criterion, rule,
    )  # fmt: skip
    entry = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    seen = (
        features[rows.where(entry < live, 0)] if len(features) else features.new_zeros(len(rows), *features.shape[1:])
    )
    maps = F.relu(F.conv2d(seen.float(), conv_weight.float(), conv_bias, padding=1))
    order, positions, live = exit_head_reference(
        maps, weight, bias, threshold, entry, positions, live, criterion, exit_index, logits, confidence, exits, rule
    )
    return rows[order], positions, live


def check(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, logits: Tensor, confidence: Tensor, exits: Tensor,
    criterion: str, rule: Tensor | None,
) -> None:  # fmt: skip
    """`RuntimeError` unless the arguments fit."""
    check_stored(("features", features), ("conv_weight", conv_weight), ("conv_bias", conv_bias))
    if features.dim() == 4 and (conv_weight.dim() != 4 or list(conv_weight.shape[1:]) != [features.shape[1], 3, 3]):
        raise RuntimeError(
            f"conv_weight has shape {list(conv_weight.shape)}; expected [C, {features.shape[1]}, 3, 3], where "
            f"{features.shape[1]} are the channels of features"
        )
    if list(conv_bias.shape) != list(conv_weight.shape[:1]) or conv_bias.dtype != torch.float32:
        raise RuntimeError(
            f"conv_bias is {conv_bias.dtype} of shape {list(conv_bias.shape)}; expected torch.float32 of shape "
            f"{list(conv_weight.shape[:1])}"
        )
    for name, tensor in (("conv_weight", conv_weight), ("conv_bias", conv_bias)):
        if tensor.device != features.device:
            raise RuntimeError(f"{name} is on {tensor.device}; move it to {features.device}, where features is")
    if conv_weight.dtype != features.dtype:
        raise RuntimeError(f"conv_weight is {conv_weight.dtype}; convert it with .to({features.dtype}), as features")
    # What follows the convolution sees its channels; an expanded scalar has that shape and costs no memory.
    maps = features
    if features.dim() == 4:
        maps = features.new_empty(()).expand(len(features), len(conv_weight), *features.shape[2:])
    results = logits, confidence, exits
    check_exit_head(maps, weight, bias, threshold, rows, positions, live, *results, criterion, rule)
    read = (("features", features), ("conv_weight", conv_weight), ("conv_bias", conv_bias))
    check_apart((("logits", logits), ("confidence", confidence), ("exits", exits)), read)


namespace.impl("exit_conv_head", reference, "CompositeExplicitAutograd")


def run_triton(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from ..kernels import exit_conv_head as kernel

    criteria.get(criterion)
    check(
        features, conv_weight, conv_bias, weight, bias, threshold, rows, positions, live, logits, confidence, exits,
        criterion, rule,
    )  # fmt: skip
    check_classes_on_cuda(len(weight) - 1)
    check_range_on_cuda(features, rows, ("conv_weight", conv_weight), ("weight", weight))
    return kernel.run(
        features, conv_weight, conv_bias, weight, bias, threshold, rows, positions, live, criterion, exit_index,
        logits, confidence, exits, rule,
    )  # fmt: skip


implement_on_cuda("exit_conv_head", run_triton)


@torch.library.register_fake("eefast::exit_conv_head")
def _fake(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_fake(features, ("conv_weight", conv_weight), ("conv_bias", conv_bias))
    check_traced(features, ("conv_weight", conv_weight, 4), weight=("conv_weight", conv_weight))
    return fake_exit_head(
        features, weight, bias, threshold, rows, positions, live, criterion, exit_index, logits, confidence, exits, rule
    )


def flops(
    features: Any, conv_weight: Any, conv_bias: Any, weight: Any, bias: Any, threshold: Any, rows: Any,
    *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """For torch's FLOP counter, from the shapes: the convolution's and the linear layer's, for all of the live list."""
    convolution = conv_weight[0] * conv_weight[1] * 9 * features[2] * features[3]
    return 2 * rows[0] * (convolution + weight[0] * weight[1])


def run(
    features: Tensor, conv_weight: Tensor, conv_bias: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor | None,
    rows: Tensor, positions: Tensor, live: Tensor, criterion: str, exit_index: int,
    logits: Tensor, confidence: Tensor, exits: Tensor, rule: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`exit_head(relu(conv2d(features, conv_weight, conv_bias, padding=1)), …)`, the last convolution of the heads of
    PTEENet (Lahiany & Aperstein 2022) with its BatchNorm folded.

    features: [M, C_in, H, W] float32, float16, bfloat16 or float64; any strides, channels-last is fast.
    conv_weight: [C, C_in, 3, 3] in the dtype of `features`, fast in channels-last. conv_bias: [C] float32.
    weight: [K + 1, C]; everything else, what is returned and what is raised as in `exit_head`.

    Products in the dtype of `features` (float64 in float32), sums, bias, ReLU and pooling in float32; the convolution's
    map is never rounded nor, on GPUs, written.
    """
    criteria.get(criterion)
    refuse_gradient("features", features, "exit_conv_head")
    return torch.ops.eefast.exit_conv_head.default(
        features, conv_weight, conv_bias, weight, bias, threshold, rows, positions, live, criterion, exit_index,
        logits, confidence, exits, rule,
    )  # fmt: skip
