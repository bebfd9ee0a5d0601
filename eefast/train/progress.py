"""Every epoch as it ends → a line on stderr, so that a log without a terminal shows the progress too."""

from __future__ import annotations

import sys

import lightning
from lightning.pytorch.callbacks import Callback

from .checkpoints import RunRecord


class EpochLines(Callback):
    """record: measures the seconds; it must come before this one in the list of callbacks."""

    def __init__(self, record: RunRecord) -> None:
        self.record = record

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        metrics, seconds = trainer.callback_metrics, self.record.seconds[-1]
        accuracy = " ".join(f"{100 * v:.2f}" for name, v in metrics.items() if name.startswith("accuracy_exit_"))
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: loss {metrics['loss']:.4f}, "
            f"held-out loss {metrics['held_out_loss']:.4f}, accuracy % by exit {accuracy}, {seconds:.0f} s",
            file=sys.stderr,
            flush=True,
        )
