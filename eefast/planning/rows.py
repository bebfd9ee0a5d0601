"""A network on rows [N, C, L] → the same network on maps of one row, which engines run; it shares the weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..modules import one_row
from . import probe, trial
from .errors import UnsupportedError


@torch.no_grad()
def network_on_maps(net: EarlyExitNet) -> EarlyExitNet:
    """It takes rows all the same: `prepare` makes maps of them.

    Raises `UnsupportedError` where its answers are not those of `net`, which counts dimensions somewhere, or has layers
    for rows that it does not know.
    """

    def on_maps(module: nn.Module) -> nn.Module:
        made = one_row.on_maps(module)
        if isinstance(made, ExitHead):
            channels, length = made.feature_shape
            made.feature_shape = channels, 1, length
        return made

    def of_maps(shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], 1, *shape[1:]

    made = EarlyExitNet(
        [on_maps(stage) for stage in net.stages],
        [on_maps(head) for head in net.heads],
        input_shape=of_maps(net.input_shape),
        criterion=net.exit_rule,
        thresholds=net.thresholds.tolist(),
        normalization=net.normalization,
        config=net.config,
        costs=[replace(cost, feature_shape=of_maps(cost.feature_shape)) for cost in net.stage_costs],
    )
    made.rows_as_maps, made.built_from = True, net.built_from
    made.training = made.stages.training = made.heads.training = False
    weight = next(net.parameters())
    noise = probe.noise(3, net.input_shape).to(weight.device, weight.dtype)
    try:
        found = made.all_exits(noise.unsqueeze(2))
    except Exception as error:  # whatever layers raise on maps
        raise UnsupportedError(f"on maps of one row it fails: {trial.brief(error)}") from error
    for i, (got, wanted) in enumerate(zip(found, net.all_exits(noise), strict=True)):
        if different := trial.difference(
            got.logits.float(), wanted.logits.float(), trial.tolerance(weight.dtype, weight.device)
        ):
            raise UnsupportedError(f"on maps of one row, the network's {different} at exit {i}")
    return made
