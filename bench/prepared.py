"""A network ready to be measured: weights, images, thresholds for a stated mix of exits; the check of its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

import eefast
from eefast.calibrate import collect, exits_taken
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput

# By dtype: how close to a threshold either exit is a right answer; how far the logits of an image may be off, root mean
# square in standard deviations. Those of another image are off by about 1.4.
FLIP_MARGIN = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-1, torch.bfloat16: 2e-1}
MNIST = "eenet32 on MNIST"


@dataclass(frozen=True)
class Network:
    """A network and the share of the images that is to leave at each exit, the final one last.

    name: in `eefast.zoo`, or in timm where `exits` names the modules that exits are attached behind.
    """

    name: str
    input_shape: tuple[int, int, int]
    num_classes: int
    mix: tuple[float, ...]
    exits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A network ready to be measured.

    net: float32, its thresholds giving the mix on the images of `batches`, which are in the measured dtype.
    outputs: what its exits say about them in float32, on the CPU.
    """

    net: EarlyExitNet
    batches: Sequence[Tensor]
    outputs: list[ExitOutput]


@dataclass(frozen=True)
class Checked:
    """Answers found to be right.

    costs: mean cost of each batch; exits: images that left at each exit; flips: as in `NetworkRow`.
    """

    costs: tuple[float, ...]
    exits: tuple[int, ...]
    flips: int


@torch.no_grad()
def network_on_noise(
    network: Network, count: int, calibrated: int, device: str, dtype: torch.dtype
) -> tuple[EarlyExitNet, Tensor, list[ExitOutput]]:
    """Random weights whose activations stay in range and whose confidences differ between images.

    Returns the network, `count` images in `dtype`, and what its exits say about them; the first `calibrated` of them
    give BatchNorm its statistics.
    """
    torch.manual_seed(0)
    # The float32 network is the yardstick; cuDNN would round what goes into its convolutions.
    torch.backends.cudnn.allow_tf32 = False
    net = _built(network).to(device)
    images = torch.randn(count, *network.input_shape, device=device)
    # What the float32 network is asked about is what the others will see, after their dtype's rounding.
    images = images.to(dtype, memory_format=torch.channels_last)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train().all_exits(images[:calibrated].float())
    net.eval()
    parts = [(part.float(), torch.zeros(len(part))) for part in images.split(256)]
    head: Any
    for head, out in zip(net.heads, collect(net, parts)[0], strict=True):
        # Confidences of a network that was never trained hardly differ; these spread over 0 … 1.
        scale = 2 / float(out.confidence_logit.std())
        head.confidence.weight.mul_(scale)
        head.confidence.bias.sub_(float(out.confidence_logit.mean())).mul_(scale)
    return net, images, collect(net, parts)[0]


def _built(network: Network) -> EarlyExitNet:
    classes, shape = network.num_classes, network.input_shape
    if not network.exits:
        return eefast.zoo.eenet(network.name, len(network.mix) - 1, num_classes=classes, input_shape=shape)
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(f"{network.name} is in timm, which is not installed: pip install timm") from error
    from eefast.surgery import attach

    backbone = timm.create_model(network.name, pretrained=False, num_classes=classes)
    return attach(backbone, network.exits, input_shape=shape)


@torch.no_grad()
def network_on_mnist(count: int) -> tuple[EarlyExitNet, Tensor, list[ExitOutput]]:
    """The shipped network with its own thresholds, and `count` real test images in an order without meaning."""
    from eefast.train.data import mnist_test

    with resources.as_file(resources.files("eefast") / "assets" / "eenet-mnist") as folder:
        net = eefast.load(folder).eval()
        thresholds = json.loads((folder / "thresholds.json").read_text())[net.criterion.name]
    net.thresholds.copy_(torch.tensor(thresholds))
    pixels, labels = mnist_test()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    images = net.prepare(pixels[order])
    return net, images, collect(net, zip(images.split(256), labels[order].split(256), strict=True))[0]


def thresholds(outputs: list[ExitOutput], mix: Sequence[float]) -> list[float]:
    """Exit by exit, half-way between two confidences, the one at which its share of all images leaves there.

    Infinity, which nobody is above, where the share is 0 or only one image arrives.
    """
    live = torch.ones(len(outputs[0].confidence), dtype=torch.bool)
    found: list[float] = []
    for out, share in zip(outputs, mix[:-1], strict=False):
        order = out.confidence[live].sort(descending=True).values
        if share == 0 or len(order) < 2:
            found.append(float("inf"))
            continue
        leaving = min(max(round(share * len(live)), 1), len(order) - 1)
        found.append(float(order[leaving - 1 : leaving + 1].mean()))
        live &= out.confidence <= found[-1]
    return found


def mix_of_cost(cost: Sequence[float], wanted: float) -> tuple[float, ...]:
    """Share of the images per exit that costs `wanted` in the mean, or as near to it as exits of these costs come.

    The same part of those who arrive leaves at every early exit.
    """

    def mix(leaving: float) -> tuple[float, ...]:
        arriving = [(1 - leaving) ** i for i in range(len(cost))]
        return (*(leaving * share for share in arriving[:-1]), arriving[-1])

    low, high = 0.0, 1.0
    if wanted >= 1:
        return mix(low)
    for _ in range(40):
        middle = (low + high) / 2
        dear = sum(share * c for share, c in zip(mix(middle), cost, strict=True)) > wanted
        low, high = (middle, high) if dear else (low, middle)
    return mix(high)


def check(
    prepared: Prepared, static: bool, logits: Tensor, taken: Tensor, dtype: torch.dtype
) -> tuple[Checked | None, str]:
    """What the answers of one way cost, or None and what is wrong with them.

    static: every image was to take the final exit. logits, taken: of all batches, float32 [N, K] and int64 [N].
    """
    net, outputs, last = prepared.net, prepared.outputs, prepared.net.num_exits
    final = torch.full((len(logits),), last)
    expected = final if static else exits_taken(outputs, net.criterion, net.thresholds.cpu())
    near = torch.zeros(len(expected), dtype=torch.bool)
    for i, (out, threshold) in enumerate(zip(outputs[:-1], net.thresholds.tolist(), strict=True)):
        near |= (i <= expected) & ((out.confidence - threshold).abs() < FLIP_MARGIN[dtype])
    flipped = taken != expected
    exact = torch.stack([out.logits for out in outputs])[taken, torch.arange(len(taken))]
    error = float((logits - exact).square().mean(1).sqrt().max() / exact.std())
    if bool((flipped & ~near).any()) or not error <= LOGIT_TOLERANCE[dtype]:
        wrong = f"{int((flipped & ~near).sum())} of {len(taken)} images took another exit"
        return None, f"WRONG: {wrong}, logits of one are off by {error:.2g} standard deviations"
    costs = [float(net.cost.cpu()[part].mean()) for part in taken.split(len(prepared.batches[0]))]
    exits = tuple(taken.bincount(minlength=last + 1).tolist())
    return Checked(tuple(costs), exits, int(flipped.sum())), ""
