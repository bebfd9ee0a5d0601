"""A float network → the layers of every stage and of every head's convolutions, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..heads import ExitHead
from ..model import EarlyExitNet
from ..planning.errors import UnsupportedError
from ..planning.head_packing import head_obstacle
from ..planning.layers import Layer, computed
from ..planning.lowering import stage_layers


class NoIntegerStepError(ValueError):
    """The resident engine has no step in integers for a module of a stage."""


@dataclass(frozen=True)
class FloatStage:
    """A stage, or the convolutions of a head: layers that read value 0 and write values 1, 2, …; it returns `output`.

    exit_index, head: which stage, or which head; path: of the module in the network.
    """

    layers: list[Layer]
    output: int
    path: str
    exit_index: int
    head: bool

    @property
    def image(self) -> bool:
        """Whether value 0 is the image."""
        return self.exit_index == 0 and not self.head

    def values(self, x: Tensor) -> dict[int, Tensor]:
        """All values by their numbers, float32, for x [N, C, H, W]."""
        values = {0: x}
        for layer in self.layers:
            values[layer.target] = computed(layer, values)
        return values


def float_stages(net: EarlyExitNet) -> list[FloatStage]:
    """The layers of `net`, BatchNorms folded, on the CPU: every stage, followed by its head's convolutions if any.

    Raises `NoIntegerStepError` or another `ValueError` that names what cannot be quantised with the path of its module.
    """
    stages, channels = list[FloatStage](), net.input_shape[0]
    for i, (stage, head, cost) in enumerate(zip(net.stages, net.heads, net.stage_costs, strict=True)):
        stages.append(_stage(stage, channels, f"stages.{i}", i, False))
        channels = cost.feature_shape[0]
        if obstacle := head_obstacle(head, i):
            raise ValueError(f"heads.{i} cannot be quantised: {obstacle}")
        convs = cast(ExitHead, head).convs
        if len(convs):
            stages.append(_stage(convs, channels, f"heads.{i}.convs", i, True))
    return stages


def _stage(module: nn.Module, channels: int, path: str, exit_index: int, head: bool) -> FloatStage:
    image = exit_index == 0 and not head
    try:
        layers, output = stage_layers(module, channels, path, image, head)
    except UnsupportedError as error:
        at = f"{path}.{error.path}" if error.path else path
        raise (ValueError if head else NoIntegerStepError)(
            f"{at} cannot be quantised: {error}, nor has a quantised network; replace that module or keep the network "
            "in float32"
        ) from error
    if image and output == 0:
        raise ValueError(f"{path} cannot be quantised: it returns the image itself")
    return FloatStage(layers, output, path, exit_index, head)
