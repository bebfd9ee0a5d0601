"""A float network and quantised stages → the quantised early-exit network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..qdq import QdqStage
from ..quantized import QuantizedStage, quantized_head
from .float_layers import FloatStage
from .qdq_ranges import QdqStages


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


def qdq_network(net: EarlyExitNet, found: QdqStages) -> EarlyExitNet:
    """The network of stages in simulated INT8, with copies of the float32 heads of `net`; else as `assembled`.

    `eefast.load` can build it again where it can build `net`.
    """
    config = None
    if not net.changed and (net.config or {}).get("kind") in ("attached", "eenet"):
        thresholds = {net.criterion.name: net.thresholds.tolist()}
        more = {"kind": "qdq", "convolutions": found.names, "float_thresholds": thresholds}
        config = {**(net.config or {}), **more}
    return with_qdq_stages(net, found.stages, config)


def with_qdq_stages(net: EarlyExitNet, stages: Sequence[QdqStage], config: Mapping[str, Any] | None) -> EarlyExitNet:
    """The network with these stages instead, in eval mode, on the device of its heads, which it shares."""
    made = EarlyExitNet(
        stages, list(net.heads), input_shape=net.input_shape, criterion=net.exit_rule,
        thresholds=net.thresholds.tolist(), normalization=net.normalization, config=config, costs=net.stage_costs,
    )  # fmt: skip
    made.record, made.preprocessing, made.classes = net.record, net.preprocessing, net.classes
    made.built_from = f"{net.built_from}, quantised"
    return made.eval().requires_grad_(False)


def _head(head: ExitHead, convs: QuantizedStage | None, input_shape: Sequence[int]) -> ExitHead:
    norm = head.norm if isinstance(head.norm, nn.BatchNorm1d | nn.BatchNorm2d) else None
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
