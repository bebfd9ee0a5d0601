"""Outputs of all exits for training images → their exit tags: the exit that each image should take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import EarlyExitNet
from ..modules.contexts import mode
from ..result import ExitOutput


def exit_tags(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """[N] int64, argmin over exits i of NLL(p_i) + cost_i for every sample, ties to the earlier exit (EENets, v4).

    outputs: of exits 0 … n. labels: [N] int64. cost: [n + 1], already weighted by λ.
    """
    losses = [F.cross_entropy(out.logits.detach(), labels, reduction="none") for out in outputs]
    return (torch.stack(losses) + cost.unsqueeze(1)).argmin(dim=0)


def random_tags(count: int, num_exits: int, seed: int) -> Tensor:
    """[count] int64, uniform over 0 … num_exits: the tags before the first epoch."""
    return torch.randint(num_exits + 1, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def refreshed(
    net: EarlyExitNet,
    batches: Iterable[tuple[Tensor, Tensor]],
    cost: Tensor,
    targets: Callable[[Sequence[ExitOutput], Tensor], Tensor] = lambda outputs, labels: labels,
) -> Tensor:
    """Tags of all images in the order of `batches`, [N] int64, from the network in eval mode, which is restored after.

    batches: (images as the network takes them, labels [N]), without augmentation and in a fixed order.
    cost: [n + 1], already weighted by λ.
    targets: (outputs, labels) → the class that each image should get.
    """
    device = next(net.parameters()).device
    found = []
    # A frozen backbone stays in eval mode while its heads train, so every module's flag is restored.
    with mode(net, training=False):
        for images, labels in batches:
            outputs = net.all_exits(net.prepare(images.to(device)))
            found.append(exit_tags(outputs, targets(outputs, labels.to(device)), cost.to(device)))
    return torch.cat(found)
