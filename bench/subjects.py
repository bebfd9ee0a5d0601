"""Names → networks to be measured: weights, images, what all their exits say about these."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn

import eefast
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

    name: in `eefast.zoo`, or where `exits` names the modules after which exits are attached, in timm or as
        `eefast.surgery.backbone` takes it.
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
    outputs = spread(net, images[:calibrated].float(), [part.float() for part in images.split(256)])
    return Subject(net, images, outputs)


@torch.no_grad()
def spread(net: EarlyExitNet, calibrated: Tensor, batches: Sequence[Tensor]) -> list[ExitOutput]:
    """In place: activations stay in range, confidences differ between images; what all exits then say about them.

    calibrated: images that give BatchNorm its statistics.
    """
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    net.train().all_exits(calibrated)
    net.eval()
    parts = [(batch, torch.zeros(len(batch))) for batch in batches]
    head: Any
    for head, out in zip(net.heads, collect(net, parts)[0], strict=True):
        # Confidences of a network that was never trained hardly differ; these spread over 0 … 1.
        scale = 2 / float(out.confidence_logit.std())
        head.confidence.weight.mul_(scale)
        head.confidence.bias.sub_(float(out.confidence_logit.mean())).mul_(scale)
    return collect(net, parts)[0]


def _built(network: Network) -> EarlyExitNet:
    classes, shape = network.num_classes, network.input_shape
    if not network.exits:
        exits, head = len(network.mix) - 1, network.head
        return eefast.zoo.eenet(network.name, exits, head=head, num_classes=classes, input_shape=shape)
    from eefast.surgery.attachment import attach
    from eefast.surgery.backbones import backbone

    name = network.name if ":" in network.name else f"timm:{network.name}"
    return attach(backbone(name, classes), network.exits, input_shape=shape)


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
