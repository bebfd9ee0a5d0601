"""Batches of images → optimiser steps: the Lightning module around an early-exit network."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import lightning
import torch
from torch import Tensor

from .. import fingerprints
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..surgery.attachment import new_parameters
from . import balanced_gradients
from .augment import random_flip, random_shift
from .losses import WeightedSum, parse
from .optimizers import OPTIMIZERS, SCHEDULES
from .tags import random_tags, refreshed


class DivergedError(RuntimeError):
    """The loss or a weight became NaN or infinite."""


class EarlyExitModule(lightning.LightningModule):
    """Trains all exits of `net` together, or the new heads of one with a frozen backbone.

    loss: a weighted sum with λ, or its text, see `eefast.train.losses.parse`.
    first_epochs: number of first epochs that minimise "deep_supervision" instead of `loss` (EENets' two stages).
    optimizer: name in `OPTIMIZERS`; "sgd" has Nesterov momentum 0.9.
    schedule: name in `SCHEDULES`; "one-cycle" varies momentum, too, as PyTorch's `OneCycleLR` does; "step" divides by
        ten after 1/2 and 3/4 of the run.
    learning_rate: at the peak of the schedule.
    shift: largest random shift of training images, in pixels.
    flip: mirror training images at random.
    frozen: train only what `eefast.surgery.attachment.new_parameters` names; the backbone stays in eval mode, so that
        its BatchNorm statistics do not change (PTEENet).
    self_labelled: the final exit's answers replace the labels (PTEENet); only with `frozen`.
    balanced: gradients of the exits are averaged in the trunk, see `balanced_gradients`.
    tag_batches: all training images in order and unchanged, for a loss with exit tags.
    seed: of the first exit tags.
    teacher: for a loss with "taught", a trained network, whose final exit all exits learn from; a copy of it is taken.

    Training batches are (images [N, C, H, W] uint8 or normalised floats, labels [N] int64, indices [N] int64 of the
    samples), validation batches have no indices.
    """

    tags: Tensor

    def __init__(
        self,
        net: EarlyExitNet,
        loss: WeightedSum | str,
        *,
        first_epochs: int = 0,
        optimizer: str = "adamw",
        schedule: str = "one-cycle",
        learning_rate: float = 0.01,
        weight_decay: float = 1e-4,
        shift: int = 0,
        flip: bool = False,
        frozen: bool = False,
        self_labelled: bool = False,
        balanced: bool = False,
        tag_batches: torch.utils.data.DataLoader | None = None,
        seed: int = 1,
        teacher: EarlyExitNet | None = None,
    ) -> None:
        super().__init__()
        self.net, self.loss = net, parse(loss) if isinstance(loss, str) else loss
        if self.loss.uses_tags and tag_batches is None:
            raise ValueError("this loss uses exit tags; give tag_batches, all training images in order")
        if self.loss.uses_teacher and teacher is None:
            raise ValueError("this loss is taught by another network; give teacher")
        if teacher is not None and teacher.num_classes != net.num_classes:
            raise ValueError(f"teacher knows {teacher.num_classes} classes, the network to train {net.num_classes}")
        if len(net.input_shape) == 2 and (shift or flip):
            raise ValueError(f"shift={shift}, flip={flip}: rows are neither shifted nor mirrored; leave both out")
        # In a tuple it is no part of what is trained, saved and counted.
        teachers = [deepcopy(teacher).eval().requires_grad_(False)] if teacher and self.loss.uses_teacher else []
        self._teacher = tuple(teachers)
        self.first_loss, self.first_epochs = parse("deep_supervision"), first_epochs
        self.optimizer, self.schedule = optimizer, schedule
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.shift, self.flip, self.frozen, self.self_labelled = shift, flip, frozen, self_labelled
        self.balanced = balanced
        # A private name, which Lightning does not take for a loader of the run.
        self._tag_batches = tag_batches
        count = len(tag_batches.dataset) if tag_batches is not None else 0  # type: ignore[arg-type]
        self.register_buffer("tags", random_tags(count, net.num_exits, seed), persistent=False)
        if frozen:
            net.requires_grad_(False)
            for _, parameter in new_parameters(net):
                parameter.requires_grad_(True)
        self._spoilt_step = torch.tensor(-1)
        self.train()

    def train(self, mode: bool = True) -> EarlyExitModule:
        super().train(mode)
        if self.frozen:
            self.net.eval()
            for head in self.net.heads[:-1]:
                head.train(mode)
        return self

    def targets(self, outputs: Sequence[ExitOutput], labels: Tensor) -> Tensor:
        """The class that each image should get, [N] int64."""
        return outputs[-1].logits.detach().argmax(dim=1) if self.self_labelled else labels

    @property
    def teacher_fingerprint(self) -> str:
        """Of its weights; "" without one."""
        return "".join(map(fingerprints.weights, self._teacher))

    @torch.no_grad()
    def taught(self, images: Tensor) -> Tensor | None:
        """Logits [N, K] of the teacher's final exit for uint8 images or normalised floats, None without a teacher."""
        for teacher in self._teacher:
            teacher.to(images.device)
            logits: Tensor = teacher.plain()(teacher.prepare(images))
            return logits
        return None

    def on_train_epoch_start(self) -> None:
        self._spoilt_step = torch.tensor(-1, device=self.device)
        # The first tags are random: a network that has learned nothing cannot choose them.
        if self.loss.uses_tags and self.current_epoch >= max(1, self.first_epochs):
            assert self._tag_batches is not None
            cost = self.net.cost * self.loss.cost_weight
            self.tags.copy_(refreshed(self.net, self._tag_batches, cost, self.targets))

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], index: int) -> Tensor:
        images, labels, samples = batch
        images = random_shift(images, self.shift) if self.shift else images
        images = random_flip(images) if self.flip else images
        prepared = self.net.prepare(images)
        outputs = (
            balanced_gradients.compute_exits(self.net, prepared) if self.balanced else self.net.all_exits(prepared)
        )
        tags = self.tags[samples] if self.loss.uses_tags else None
        compute = self.first_loss if self.current_epoch < self.first_epochs else self.loss
        taught = self.taught(images) if compute.uses_teacher else None
        loss = compute(outputs, self.targets(outputs, labels), self.net.cost, tags, taught)
        self._check(loss.detach(), index)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def _check(self, loss: Tensor, index: int) -> None:
        """Note the first step whose loss is NaN or infinite, and stop; on a GPU, which waits, every 50 steps."""
        fine = torch.isfinite(loss) | (self._spoilt_step >= 0)
        self._spoilt_step = torch.where(fine, self._spoilt_step, index)
        # Several processes must stop together: at the end of the epoch.
        if self.trainer.world_size == 1 and (loss.device.type == "cpu" or index % 50 == 49):
            self._stop_if_diverged(finite=True)

    def on_train_epoch_end(self) -> None:
        # Before the checkpoints are written, so that the last good ones are kept.
        self._stop_if_diverged(all(bool(parameter.isfinite().all()) for parameter in self.parameters()))

    def _stop_if_diverged(self, finite: bool) -> None:
        step = int(self._spoilt_step)
        if self.trainer.strategy.reduce_boolean_decision(step >= 0 or not finite, all=False):
            what = (
                f"the loss is NaN or infinite in step {step + 1}"
                if step >= 0
                else "weights are NaN or infinite at the end"
            )
            raise DivergedError(
                f"training diverged: {what} of epoch {self.current_epoch + 1}; lower learning_rate={self.learning_rate}"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        outputs = self.net.all_exits(self.net.prepare(images))
        # The same loss in both stages, so that epochs can be compared.
        targets, taught = self.targets(outputs, labels), self.taught(images)
        metrics = {"held_out_loss": self.loss(outputs, targets, self.net.cost, teacher=taught)}
        answers = torch.stack([out.logits.argmax(dim=1) for out in outputs])
        for i, answer in enumerate(answers):
            metrics[f"accuracy_exit_{i}"] = (answer == labels).float().mean()
        for i, answer in enumerate(answers[:-1]):
            metrics[f"agreement_exit_{i}"] = (answer == answers[-1]).float().mean()
        self.log_dict(metrics, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[self.optimizer](trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = SCHEDULES[self.schedule](optimizer, self.learning_rate, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
