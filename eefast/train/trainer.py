"""A module and batches → the checkpoint of its best epoch: Lightning's training loop."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader

from .batches import EpochSeeds
from .checkpoints import CheckpointWriter, RunRecord, best_and_last, read_checkpoint
from .curves import CurvesLogger
from .failures import explained
from .folder import LOGS_FOLDER, begin
from .module import EarlyExitModule
from .options import TrainOptions
from .progress import EpochLines


@dataclass(frozen=True)
class Fitted:
    """What training left.

    best: the checkpoint of the epoch with the lowest held-out loss, see `checkpoints.read_checkpoint`.
    seconds_per_epoch: of all epochs, those before the run was resumed included.
    device: that of this process; is_first_process: whether it is the one that writes files.
    """

    best: dict[str, Any]
    best_held_out_loss: float
    seconds_per_epoch: list[float]
    device: torch.device
    is_first_process: bool


def seed_everything(seed: int) -> None:
    """Seed all generators of random numbers, also those of processes that decode images."""
    lightning.seed_everything(seed, workers=True, verbose=False)


def fit(
    module: EarlyExitModule,
    train_batches: DataLoader,
    held_out_batches: DataLoader,
    options: TrainOptions,
    images: str,
    checkpoint: Path | None,
) -> Fitted:
    """Train all epochs, or those after `checkpoint`; writes the checkpoints, curves and started.json to the folder.

    train_batches: of `training_batches`; images: the fingerprint of the training images.
    Raises `ValueError` for a device, output folder or checkpoint that does not fit, `DivergedError`, `WriteError`, and
    `RuntimeError` for images that cannot be read.
    """
    output = Path(options.output)
    record, writer = RunRecord(options.record(), images, module.teacher_fingerprint), CheckpointWriter()
    best, last = best_and_last(output)
    narrow = _too_narrow_for_onednn(module.net)
    with (
        _quiet(),
        explained(record, writer, checkpoint),
        torch.backends.mkldnn.flags(enabled=False) if narrow else nullcontext(),
    ):
        trainer = lightning.Trainer(
            accelerator=options.device,
            devices=options.devices,
            num_nodes=options.nodes,
            strategy=_strategy(options),
            precision=options.precision,  # type: ignore[arg-type]
            max_epochs=options.epochs,
            logger=_loggers(output, options.tensorboard),
            log_every_n_steps=1,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            plugins=[writer],
            callbacks=[
                EpochSeeds(options.seed, train_batches),
                record,
                EpochLines(record, within=not sys.stderr.isatty()),
                best,
                last,  # after best, whose score it saves too
                *([RichProgressBar(console_kwargs={"stderr": True})] if sys.stderr.isatty() else []),
            ],
        )
        if trainer.is_global_zero:
            begin(output, options)
        trainer.fit(module, train_batches, held_out_batches, ckpt_path=checkpoint, weights_only=True)
    if best.best_model_score is None or not best.best_model_score.isfinite():
        raise RuntimeError(
            f"training diverged: the loss is NaN or infinite; lower learning_rate={options.learning_rate}"
        )
    return Fitted(
        read_checkpoint(Path(best.best_model_path)),
        float(best.best_model_score),
        record.seconds,
        trainer.strategy.root_device,
        trainer.is_global_zero,
    )


def _strategy(options: TrainOptions) -> str:
    several = (options.devices, options.nodes) != (1, 1)
    # Some losses leave rows of confidence out, for which plain "ddp" would wait forever.
    return "ddp_find_unused_parameters_true" if several and options.strategy == "auto" else options.strategy


def _loggers(output: Path, tensorboard: bool) -> list[Any]:
    logs = CurvesLogger(output, LOGS_FOLDER)
    return [logs, *([TensorBoardLogger(output, LOGS_FOLDER, logs.version)] if tensorboard else [])]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints about hardware and worker processes, which do not suit data in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers.*",
                ".*Checkpoint directory .* exists and is not empty.*",
                ".*in eval mode at the start of training.*",
            ):
                warnings.filterwarnings("ignore", message=message)
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", category=category, module="lightning")
            yield
    finally:
        logger.setLevel(level)


def _too_narrow_for_onednn(network: nn.Module) -> bool:
    """Whether PyTorch's oneDNN must not train it: on AVX2 the backward pass of two channels never ends, or aborts.

    Seen with torch 2.14.1; with AVX-512 and from four channels on it works.
    """
    narrow = any(isinstance(m, nn.Conv2d) and m.out_channels < 4 for m in network.modules())
    return narrow and "AVX512" not in torch.backends.cpu.get_cpu_capability()
