"""Batches of images → optimiser steps: the Lightning module around an early-exit network."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor

from ..model import EarlyExitNet
from .augment import random_shift
from .losses import Loss

OPTIMIZERS = ("adamw", "sgd")


class EarlyExitModule(lightning.LightningModule):
    """Trains all exits of `net` together; learning rate by one cycle over the whole run.

    loss: see `eefast.train.losses`.
    optimizer: "adamw", or "sgd" (Nesterov momentum 0.9).
    learning_rate: at the peak of the cycle.
    shift: training images are moved at random by at most so many pixels.

    Batches are (images [N, C, H, W] uint8 or normalised floats, labels [N] int64).
    """

    def __init__(
        self,
        net: EarlyExitNet,
        loss: Loss,
        *,
        optimizer: str = "adamw",
        learning_rate: float = 0.01,
        weight_decay: float = 1e-4,
        shift: int = 0,
    ) -> None:
        super().__init__()
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={optimizer!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
        self.net, self.loss, self.shift = net, loss, shift
        self.optimizer, self.learning_rate, self.weight_decay = optimizer, learning_rate, weight_decay

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        outputs = self.net(random_shift(images, self.shift) if self.shift else images)
        loss = self.loss(outputs, labels, self.net.cost)
        self.log("loss", loss, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        outputs = self.net.all_exits(self.net.prepare(images))
        metrics = {"held_out_loss": self.loss(outputs, labels, self.net.cost)}
        for i, out in enumerate(outputs):
            metrics[f"accuracy_exit_{i}"] = (out.logits.argmax(dim=1) == labels).float().mean()
        self.log_dict(metrics, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        arguments: dict[str, Any] = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.optimizer == "sgd":
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                self.parameters(), momentum=0.9, nesterov=True, **arguments
            )
        else:
            optimizer = torch.optim.AdamW(self.parameters(), **arguments)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
