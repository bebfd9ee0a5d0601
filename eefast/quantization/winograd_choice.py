"""Quantised stages with direct convolutions → how each map size is convolved, within a bound on the logits' error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..modules.integer_maps import exact_winograd_inputs, winograd_inputs
from ..quantized import QuantizedStage
from .float_layers import FloatStage
from .integer_steps import can_use_winograd
from .ranges import Ranges

Excess = Mapping[int, Mapping[int, Tensor]]
"""By stage and layer: the mean excess of a convolution's transformed inputs, see `quantized_stage`."""
Size = tuple[int, int]
Choice = Mapping[Size, int]
"""By map size: 0 for direct convolutions, 1 for F(2, 3) along x, 2 for F(2×2, 3×3)."""

SMALL_ERROR = 0.05
"""Winograd may bring the error of the logits up to this, see `logit_error`.

On MNIST, at 0.046, the last exit loses 0.01 points and the exits at most 0.07 at equal mean cost; with F(2×2) at every
size, at 0.094, the exits lose up to 0.21.
"""
ERROR_RATIO = 1.25
"""Where direct sums are not that exact either: how many times their error."""


def coarsest(size: Size, allowed: int) -> int:
    """Up to `allowed`, see `Choice`, the algorithm with the fewest products for maps of this size.

    F(2, 3) takes more than direct sums where there is one column, and F(2×2) hardly fewer; F(2×2) takes more than
    F(2, 3) where there is one row.
    """
    height, width = size
    return 0 if width == 1 else min(allowed, 1 if height == 1 else 2)


def winograd_layers(
    layers: Sequence[FloatStage],
    ranges: Sequence[Ranges],
    stages: Sequence[QuantizedStage],
    batches: Sequence[Tensor],
    winograd: int,
) -> dict[Size, dict[int, dict[int, Tensor]]]:
    """By (H, W) of their maps the layers that Winograd can compute, with the mean excess of their inputs, see `Excess`.

    stages: with direct convolutions; batches: images [n, C, H, W] float32.
    winograd: the coarsest algorithm, see `coarsest`.
    """
    found: dict[Size, dict[int, dict[int, Tensor]]] = {}
    images = sum(map(len, batches))
    for x in batches:
        for s, (described, stage) in enumerate(zip(layers, stages, strict=True)):
            values = stage.integers(stage.input_integers(x))
            for i, layer in enumerate(described.layers):
                source = values[layer.source]
                size = source.shape[2], source.shape[3]
                if (used := coarsest(size, winograd)) and can_use_winograd(described, ranges[s], layer):
                    of_stage = found.setdefault(size, {}).setdefault(s, {})
                    of_stage[i] = of_stage.get(i, torch.zeros(())) + _mean_excess(source, used) * (len(x) / images)
            x = x if described.head else stage.features(values)
    return found


def _mean_excess(source: Tensor, winograd: int) -> Tensor:
    """[C, 4] or [C, 4, 4] float64: what rounding adds to the transformed inputs, on average over images and tiles."""
    excess = winograd_inputs(source, winograd) - exact_winograd_inputs(source, winograd)
    return excess.double().mean((-4, -2, -1)).movedim(-1, 0)


def merged(found: Mapping[Size, Excess]) -> dict[int, dict[int, Tensor]]:
    """The layers of all sizes."""
    result: dict[int, dict[int, Tensor]] = {}
    for of_size in found.values():
        for stage, excess in of_size.items():
            result.setdefault(stage, {}).update(excess)
    return result


def chosen(
    coarse: Choice, built: Callable[[Choice], EarlyExitNet], net: EarlyExitNet, batches: Sequence[Tensor]
) -> dict[Size, int]:
    """The coarsest algorithms up to `coarse` that keep the bound on the logits' error against the float network `net`.

    built: makes the network with a choice of algorithms; sizes that it does not have are computed directly.
    The bound is `SMALL_ERROR` or, if that is more, `ERROR_RATIO` times the error of direct sums. While all sizes
    together exceed it, the one with the largest error alone goes to the next finer algorithm.
    """
    expected = _logits(net, batches)

    @cache
    def error(*sizes: tuple[Size, int]) -> float:
        return logit_error(_logits(built(dict(sizes)), batches), expected)

    left = {size: winograd for size, winograd in coarse.items() if winograd}
    if left and error(*left.items()) > SMALL_ERROR:
        bound = max(SMALL_ERROR, ERROR_RATIO * error())
        while left and error(*left.items()) > bound:
            worst = max(left, key=lambda size: error((size, left[size]))) if len(left) > 1 else next(iter(left))
            left[worst] -= 1
            left = {size: winograd for size, winograd in left.items() if winograd}
    return {size: left.get(size, 0) for size in coarse}


def _logits(net: EarlyExitNet, batches: Sequence[Tensor]) -> Tensor:
    """[exits, N, K]."""
    return torch.cat([torch.stack([out.logits for out in net.all_exits(x)]) for x in batches], 1)


def logit_error(found: Tensor, expected: Tensor) -> float:
    """Difference of logits relative to their deviation, both root mean squares over images, classes and then exits.

    found, expected: [exits, N, K]. Deviations are taken per exit.
    """
    squares = (found.double() - expected.double()).square().mean((1, 2))
    spread = expected.double().flatten(1).var(1, correction=0)
    return float((squares / spread.clamp_min(1e-30)).mean().sqrt())
