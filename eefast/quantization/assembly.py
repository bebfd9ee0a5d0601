"""A float network and quantised stages → the quantised early-exit network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..quantized import QuantizedStage, quantized_head
from .float_layers import FloatStage


@torch.no_grad()
def assembled(net: EarlyExitNet, layers: Sequence[FloatStage], stages: Sequence[QuantizedStage]) -> EarlyExitNet:
    """The network of `stages`, made of `layers`, and of copies of the heads' linears; in eval mode, on the CPU.

    Exit rule, costs, normalization, record and thresholds are those of `net`; it remembers whose thresholds these are.
    """
    convs = {described.exit_index: stage for described, stage in zip(layers, stages, strict=True) if described.head}
    modules = [stage for described, stage in zip(layers, stages, strict=True) if not described.head]
    heads = [_head(cast(ExitHead, head), convs.get(i), net.input_shape) for i, head in enumerate(net.heads)]
    thresholds = net.thresholds.tolist()
    config = {"kind": "quantized", "name": net.name, "float_thresholds": {net.criterion.name: thresholds}}
    made = EarlyExitNet(
        modules, heads, input_shape=net.input_shape, criterion=net.exit_rule, thresholds=thresholds,
        normalization=net.normalization, config=config, costs=net.stage_costs,
    )  # fmt: skip
    made.record, made.preprocessing, made.classes = net.record, net.preprocessing, net.classes
    return made.eval().requires_grad_(False)


def _head(head: ExitHead, convs: QuantizedStage | None, input_shape: Sequence[int]) -> ExitHead:
    norm = head.norm if isinstance(head.norm, nn.BatchNorm2d) else None
    made = quantized_head(
        head.kind, head.feature_shape, len(head.classifier.weight), input_shape,
        convs=convs, eps=norm.eps if norm else None,
    )  # fmt: skip
    pairs: list[tuple[nn.Module, nn.Module]] = [(made.classifier, head.classifier), (made.confidence, head.confidence)]
    if norm is not None:
        pairs.append((made.norm, norm))
    for new, old in pairs:
        for name, value in new.state_dict().items():
            if (given := getattr(old, name)) is None:  # no bias, or a BatchNorm without weights
                value.fill_(float(name == "weight"))
            else:
                value.copy_(given)
    return made
