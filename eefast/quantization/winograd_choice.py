"""Quantised stages with direct convolutions → which map sizes are computed by F(2, 3), within a bound on the error."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..modules.integer_maps import exact_winograd_inputs, winograd_inputs
from ..quantized import QuantizedStage
from .float_layers import FloatStage
from .integer_steps import can_use_winograd
from .ranges import Ranges

Excess = Mapping[int, Mapping[int, Tensor]]
"""By stage and layer: the mean excess [C, 4] of the transformed inputs of a convolution that F(2, 3) computes."""
Size = tuple[int, int]

SMALL_ERROR = 0.05
"""F(2, 3) may bring the error of the logits up to this, see `logit_error`; at 0.044 MNIST's last exit lost nothing."""
ERROR_RATIO = 1.25
"""Where direct sums are not that exact either: how many times their error."""


def winograd_layers(
    layers: Sequence[FloatStage], ranges: Sequence[Ranges], stages: Sequence[QuantizedStage], batches: Sequence[Tensor]
) -> dict[Size, dict[int, dict[int, Tensor]]]:
    """By (H, W) of their maps the layers that F(2, 3) can compute, with the mean excess of their inputs, see `Excess`.

    Without maps of one column, where it takes more products than direct sums.
    stages: with direct convolutions; batches: images [n, C, H, W] float32.
    """
    found: dict[Size, dict[int, dict[int, Tensor]]] = {}
    images = sum(map(len, batches))
    for x in batches:
        for s, (described, stage) in enumerate(zip(layers, stages, strict=True)):
            values = stage.integers(stage.input_integers(x))
            for i, layer in enumerate(described.layers):
                source = values[layer.source]
                if can_use_winograd(described, ranges[s], layer) and source.shape[3] > 1:
                    of_stage = found.setdefault((source.shape[2], source.shape[3]), {}).setdefault(s, {})
                    of_stage[i] = of_stage.get(i, torch.zeros(())) + _mean_excess(source) * (len(x) / images)
            x = x if described.head else stage.features(values)
    return found


def _mean_excess(source: Tensor) -> Tensor:
    """[C, 4] float64: what rounding adds to the transformed inputs, on average over images, rows and tiles."""
    pairs = zip(winograd_inputs(source), exact_winograd_inputs(source), strict=True)
    return torch.stack([(rounded - exact).double().mean((0, 2, 3)) for rounded, exact in pairs], 1)


def merged(found: Mapping[Size, Excess], sizes: Collection[Size]) -> dict[int, dict[int, Tensor]]:
    """All layers of some sizes."""
    result: dict[int, dict[int, Tensor]] = {}
    for size in sizes:
        for stage, excess in found[size].items():
            result.setdefault(stage, {}).update(excess)
    return result


def chosen_sizes(
    sizes: Sequence[Size],
    built: Callable[[Collection[Size]], EarlyExitNet],
    net: EarlyExitNet,
    batches: Sequence[Tensor],
) -> list[Size]:
    """The map sizes for which F(2, 3) keeps the bound on the logits' error against the float network `net`.

    built: makes the network in which these sizes are computed by F(2, 3). The bound is `SMALL_ERROR` or, if that is
    more, `ERROR_RATIO` times the error of direct sums. Where all sizes together exceed it, those go that exceed the
    direct sums by most alone.
    """
    expected = _logits(net, batches)

    def error(sizes: Collection[Size]) -> float:
        return logit_error(_logits(built(sizes), batches), expected)

    chosen = list(sizes)
    if not chosen or (together := error(chosen)) <= SMALL_ERROR:
        return chosen
    bound = max(SMALL_ERROR, ERROR_RATIO * error(()))
    if together <= bound:
        return chosen
    alone = {size: error([size]) for size in chosen} if len(chosen) > 1 else {}
    while chosen and together > bound:
        chosen.remove(max(chosen, key=lambda size: alone.get(size, 0.0)))
        together = error(chosen) if chosen else bound
    return chosen


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
