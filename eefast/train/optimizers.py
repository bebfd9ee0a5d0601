"""The names that options give to PyTorch's optimisers, and to its learning-rate schedules by step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch.optim import Optimizer, lr_scheduler

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
}
# (optimiser, peak learning rate, number of steps) → schedule
SCHEDULES: dict[str, Callable[[Optimizer, float, int], lr_scheduler.LRScheduler]] = {
    "one-cycle": lambda optimizer, peak, steps: lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps),
    "cosine": lambda optimizer, peak, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    # As He et al. (2016) train ResNets on CIFAR-10.
    "step": lambda optimizer, peak, steps: lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4]),
    "constant": lambda optimizer, peak, steps: lr_scheduler.ConstantLR(optimizer, factor=1.0),
}
