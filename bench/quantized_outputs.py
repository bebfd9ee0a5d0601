"""A quantised network and images → outputs of all exits: maps by the resident engine, early exits by PyTorch's heads.

PyTorch computes maps of integers ten times as slowly, and they are the same: on the first images both are compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

import eefast
from eefast.engines.parts import features_of
from eefast.engines.resident import ResidentEngine
from eefast.model import EarlyExitNet
from eefast.planning import probe
from eefast.result import ExitOutput

COMPARED = 32
"""Images of the first batch."""

ALLOWED = 1e-4
"""Difference of the final exit's float32 logits ÷ largest: there the engine computes the head, too."""


@torch.no_grad()
def outputs(net: EarlyExitNet, batches: Iterable[Tensor]) -> list[ExitOutput]:
    """As `thresholds.outputs.collect`, but for confidences of the final exit, which decide nothing: none is a logit.

    batches: images as the network takes them. Raises `RuntimeError` where the engine's answers are not PyTorch's.
    """
    net = net.with_criterion(probe.criterion(net), probe.thresholds(net, net.num_exits).tolist()).eval()
    engine = cast(ResidentEngine, eefast.accelerate(net, engine="resident", frozen=True).engine)
    parts: list[list[ExitOutput]] = []
    for images in batches:
        parts.append(_of_batch(net, engine, images))
        if len(parts) == 1:
            _compare(net, images[:COMPARED], parts[0])
    return [ExitOutput(*map(torch.cat, zip(*column, strict=True))) for column in zip(*parts, strict=True)]


def _of_batch(net: EarlyExitNet, engine: ResidentEngine, images: Tensor) -> list[ExitOutput]:
    maps, found = engine.prepare(images), list[ExitOutput]()
    for i in range(net.num_exits):
        made = engine.part(maps, net.thresholds, i, i)
        assert made.features is not None
        assert made.places is not None
        maps = made.features[made.places]
        found.append(net.heads[i](features_of(net, i + 1, maps, torch.float32)))
    last = engine.part(maps, net.thresholds, net.num_exits, net.num_exits).result
    return [*found, ExitOutput(last.logits, last.confidence, last.confidence)]


def _compare(net: EarlyExitNet, images: Tensor, found: list[ExitOutput]) -> None:
    expected = net.all_exits(net.prepare(images))
    for i, (got, wanted) in enumerate(zip(found[:-1], expected, strict=False)):
        if not all(torch.equal(a[: len(images)], b) for a, b in zip(got, wanted, strict=True)):
            raise RuntimeError(f"exit {i}: the resident engine's maps are not the integers that PyTorch computes")
    logits = expected[-1].logits
    if not (found[-1].logits[: len(images)] - logits).abs().max() <= ALLOWED * logits.abs().max():
        raise RuntimeError("the final exit: the resident engine's logits are not those that PyTorch computes")
