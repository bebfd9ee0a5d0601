"""Steps and epochs of training → lines on stderr, so that a log without a terminal shows the progress too."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from .checkpoints import RunRecord

SECONDS = 30.0
"""Between two lines within an epoch."""


class EpochLines(Callback):
    """record: measures the seconds; it must come before this one in the list of callbacks.

    within: whether there are lines within an epoch, too, for logs without a progress bar.
    """

    def __init__(self, record: RunRecord, within: bool = True) -> None:
        self.record, self.within, self.last = record, within, time.monotonic()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        now, steps = time.monotonic(), trainer.num_training_batches
        if not self.within or not trainer.is_global_zero or now - self.last < SECONDS or index + 1 == steps:
            return
        self.last = now
        loss = float(outputs["loss"])
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: step {index + 1} of {steps}, loss {loss:.4f}",
            file=sys.stderr,
            flush=True,
        )

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.last = time.monotonic()
        metrics, seconds = trainer.callback_metrics, self.record.seconds[-1]
        accuracy = " ".join(f"{100 * v:.2f}" for name, v in metrics.items() if name.startswith("accuracy_exit_"))
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: loss {metrics['loss']:.4f}, "
            f"held-out loss {metrics['held_out_loss']:.4f}, accuracy % by exit {accuracy}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
