"""A small network, numbered images, and their exit tags by a loop over single images."""

import copy
import math

import torch
from networks import lived_in

from eefast import EarlyExitNet, ExitOutput, zoo
from eefast.data.image_sets import ImageTensors


def small_net() -> EarlyExitNet:
    torch.manual_seed(0)
    return lived_in(zoo.eenet("eenet20", 2, "linear", "conv1", 3, (1, 8, 8), normalization=([0.5], [0.25])), seed=1)


def numbered_images(n: int) -> ImageTensors:
    """Image i carries i in its first pixel."""
    images = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    images[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
    return ImageTensors(images, torch.arange(n) % 3)


def looped_tags(outputs: list[ExitOutput], labels: torch.Tensor, cost: list[float]) -> list[int]:
    tags = []
    for row, label in enumerate(labels.tolist()):
        prices = []
        for out, c in zip(outputs, cost, strict=True):
            values = out.logits[row].double().tolist()
            prices.append(math.log(sum(math.exp(v - max(values)) for v in values)) + max(values) - values[label] + c)
        tags.append(prices.index(min(prices)))
    return tags


@torch.no_grad()
def tags_one_by_one(net: EarlyExitNet, images: ImageTensors, cost_weight: float) -> list[int]:
    net = copy.deepcopy(net).eval()
    tags = []
    for i in range(len(images)):
        outputs = net.all_exits(net.prepare(images.images[i : i + 1]))
        tags += looped_tags(outputs, images.labels[i : i + 1], [c * cost_weight for c in net.cost.tolist()])
    return tags
