"""Static: the same ResNet with fewer blocks, by ONNX Runtime, about as expensive as early exits make the network."""

from __future__ import annotations

import copy

from torch import nn

from eefast.cost import macs
from eefast.measure import baselines, runtimes
from eefast.measure.baselines import Run
from eefast.model import EarlyExitNet
from eefast.zoo.resnets import BasicBlock, Bottleneck

from .peer import Peer, onnx_runtime_version

# Of the whole network; a ResNet-20 costs 0.16 of a ResNet-110.
COST = 0.25


def smaller(net: EarlyExitNet) -> EarlyExitNet:
    """Without early exits, and with blocks left out evenly until its MACs come down to `COST` of `net`'s.

    Blocks that change the size or the channels stay, so it may cost more. Raises `ValueError` where there are no
    others, as in a network that is no ResNet of `eefast.zoo`.
    """
    trunk = nn.Sequential(*net.stages)
    kinds = BasicBlock, Bottleneck
    names = [name for name, m in trunk.named_modules() if isinstance(m, kinds) and m.downsample is None]
    if not names:
        raise ValueError("it has no residual blocks that can be left out; only networks of eefast.zoo have")
    total, least = (macs(part, net.input_shape)[0] for part in (trunk, _without(trunk, names)))
    kept = max(int((COST * total - least) / (total - least) * len(names)), 0)
    stay = {names[i * len(names) // kept] for i in range(kept)}
    left = _without(trunk, [name for name in names if name not in stay])
    return EarlyExitNet([left], [net.heads[-1]], input_shape=net.input_shape).eval()


def _without(trunk: nn.Module, names: list[str]) -> nn.Module:
    left = copy.deepcopy(trunk)
    for name in names:
        left.set_submodule(name, nn.Identity())
    return left


def prepare(net: EarlyExitNet) -> Run:
    return baselines.onnx_runtime(smaller(net))


PEER = Peer(
    "fewer blocks, ONNX Runtime",
    prepare,
    onnx_runtime_version,
    True,
    "onnxruntime",
    needs=runtimes.ONNX_NEEDS,
    stand_in=smaller,
)
