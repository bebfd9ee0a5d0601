"""Networks to be measured: weights, images, thresholds for a stated mix of exits; the check of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

import eefast
from eefast.criteria import get
from eefast.measure.comparison import judge
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput
from eefast.thresholds.outputs import collect

MNIST = "eenet32 on MNIST"


@dataclass(frozen=True)
class Subject:
    """A network with its thresholds, images as it takes them, and what all its exits say about them in float32."""

    net: EarlyExitNet
    images: Tensor
    outputs: list[ExitOutput]


@dataclass(frozen=True)
class Network:
    """A network and the share of the images that is to exit at each exit, the final one last.

    name: in `eefast.zoo`, or in timm where `exits` names the modules after which exits are attached.
    real: instead, count → a trained network and that number of images, float32; `mix` is empty then.
    head: of the early exits, see `eefast.heads.ExitHead`; timm's networks have "pool".
    """

    name: str
    input_shape: tuple[int, ...]
    num_classes: int
    mix: tuple[float, ...]
    exits: tuple[str, ...] = ()
    real: Callable[[int], Subject] | None = None
    head: str = "pool"


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

    costs: mean cost of each batch; exits: number of images at each exit; flips: as in `NetworkRow`.
    """

    costs: tuple[float, ...]
    exits: tuple[int, ...]
    flips: int


@torch.no_grad()
def network_on_noise(network: Network, count: int, calibrated: int, device: str, dtype: torch.dtype) -> Subject:
    """Random weights whose activations stay in range and whose confidences differ between images.

    count: number of images, in `dtype`; the first `calibrated` of them give BatchNorm its statistics.
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
    return Subject(net, images, collect(net, parts)[0])


def _built(network: Network) -> EarlyExitNet:
    classes, shape = network.num_classes, network.input_shape
    if not network.exits:
        exits, head = len(network.mix) - 1, network.head
        return eefast.zoo.eenet(network.name, exits, head=head, num_classes=classes, input_shape=shape)
    try:
        import timm
    except ImportError as error:
        raise ModuleNotFoundError(f"{network.name} is in timm, which is not installed: pip install timm") from error
    from eefast.surgery.attachment import attach

    backbone = timm.create_model(network.name, pretrained=False, num_classes=classes)
    return attach(backbone, network.exits, input_shape=shape)


def shipped() -> tuple[EarlyExitNet, dict[str, list[float]]]:
    """The network that comes with the package, trained on MNIST, and its thresholds by criterion."""
    with resources.as_file(resources.files("eefast") / "assets" / "eenet-mnist") as folder:
        return eefast.load(folder).eval(), json.loads((folder / "thresholds.json").read_text())


@torch.no_grad()
def network_on_mnist(count: int) -> Subject:
    """The shipped network with its own thresholds, and `count` real test images in a random order."""
    from eefast.data.mnist import mnist_test

    net, thresholds = shipped()
    net.thresholds.copy_(torch.tensor(thresholds[net.criterion.name]))
    return on_images(net, mnist_test()[0], count)


@torch.no_grad()
def on_images(net: EarlyExitNet, pixels: Tensor, count: int) -> Subject:
    """At most `count` of the uint8 images `pixels`, in a random order."""
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:count]
    images = net.prepare(pixels[order])
    return Subject(net, images, collect(net, [(part, torch.zeros(len(part))) for part in images.split(256)])[0])


MIDDLE = Network("eenet18", (3, 64, 64), 200, (0.0, 0.0, 0.0, 1.0))
LARGE = Network("eenet50", (3, 224, 224), 1000, (0.0, 0.0, 0.0, 1.0))
ON_MNIST = Network(MNIST, (1, 28, 28), 10, (), real=network_on_mnist)


def thresholds(outputs: list[ExitOutput], mix: Sequence[float], criterion: str = "learned") -> list[float]:
    """Exit by exit, half-way between two confidences, the one at which its share of all images exits there.

    An infinity, at which no sample exits, where the share is 0 or only one image arrives.
    """
    rule = get(criterion)
    # An image that exits below a threshold exits above it with the signs turned.
    sign = 1.0 if rule.comparison == ">" else -1.0
    live = torch.ones(len(outputs[0].confidence), dtype=torch.bool)
    found: list[float] = []
    for out, share in zip(outputs, mix[:-1], strict=False):
        learned = rule.name == "learned"
        confidence = sign * (out.confidence if learned else rule.confidence(out.logits, out.confidence_logit))
        order = confidence[live].sort(descending=True).values
        if share == 0 or len(order) < 2:
            found.append(sign * float("inf"))
            continue
        leaving = min(max(round(share * len(live)), 1), len(order) - 1)
        limit = float(order[leaving - 1 : leaving + 1].mean())
        found.append(sign * limit)
        live &= confidence <= limit
    return found


def mix_of_cost(cost: Sequence[float], wanted: float) -> tuple[float, ...]:
    """Share of the images per exit that costs `wanted` in the mean, or as near to it as exits of these costs allow.

    The same part of those that arrive exits at every early exit.
    """

    def mix(leaving: float) -> tuple[float, ...]:
        arriving = [(1 - leaving) ** i for i in range(len(cost))]
        return (*(leaving * share for share in arriving[:-1]), arriving[-1])

    low, high = 0.0, 1.0
    if wanted >= 1:
        return mix(low)
    for _ in range(40):
        middle = (low + high) / 2
        above = sum(share * c for share, c in zip(mix(middle), cost, strict=True)) > wanted
        low, high = (middle, high) if above else (low, middle)
    return mix(high)


def check(
    prepared: Prepared, static: bool, logits: Tensor, taken: Tensor, dtype: torch.dtype
) -> tuple[Checked | None, str]:
    """What answers cost, or None and what is wrong with them.

    static: every image was to take the final exit. logits, taken: of all batches, float32 [N, K] and int64 [N].
    """
    net = prepared.net
    flips, problem = judge(None if static else net, prepared.outputs, logits, taken, dtype)
    if problem:
        return None, f"WRONG: {problem}"
    costs = [float(net.cost.cpu()[part].mean()) for part in taken.split(len(prepared.batches[0]))]
    exits = tuple(taken.bincount(minlength=net.num_exits + 1).tolist())
    return Checked(tuple(costs), exits, flips), ""
