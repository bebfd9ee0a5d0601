"""The whole way from a data set's name to a folder with a trained, calibrated network."""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate, random_split

from .. import zoo
from ..calibrate import Calibration, calibrate, collect, outcome
from ..criteria import CRITERIA
from . import data, losses
from .module import EarlyExitModule

THRESHOLDS_FILE, REPORT_FILE = "thresholds.json", "report.json"


@dataclass(frozen=True)
class TrainReport:
    """What a training run measured; `report.json` holds the same.

    held_out, test: per criterion in `eefast.criteria`, its thresholds and their accuracy and mean cost; `test` is None
        unless it was asked for. The thresholds always come from the held-out images.
    exit_accuracy: held-out accuracy of every exit for all images.
    seconds_per_epoch: wall clock, one number per epoch, validation included.
    """

    arguments: dict[str, Any]
    exit_accuracy: list[float]
    held_out: dict[str, Calibration]
    test: dict[str, Calibration] | None
    seconds_per_epoch: list[float]


def train(
    net: str = "eenet20",
    *,
    dataset: str = "mnist",
    data_root: str | Path = "data",
    output: str | Path = "trained",
    download: bool = False,
    num_exits: int = 3,
    placement: str | Sequence[int] = "fine",
    head: str = "pool",
    epochs: int = 12,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    optimizer: str = "adamw",
    weight_decay: float = 1e-4,
    loss: str = "deep_supervision+correctness",
    cost_weight: float = 1.0,
    shift: int = 0,
    held_out: int = 5000,
    max_accuracy_drop: float = 0.005,
    max_cost: float | None = None,
    seed: int = 1,
    device: str = "auto",
    workers: int = 0,
    test: bool = False,
) -> TrainReport:
    """Train an EENet, choose its thresholds on held-out training images, save it to a folder for `eefast.load`.

    net: name of the network, "eenet8" … "eenet152".
    dataset: name of the data set, see `eefast.train.data.DATASETS`.
    data_root: folder with the data set's published files.
    output: folder for config.json, model.safetensors, thresholds.json (thresholds for every criterion), report.json
        and last.ckpt (Lightning's checkpoint with the optimiser's state).
    download: fetch missing files into `data_root` where torchvision can.
    num_exits: number of early exits.
    placement: where they stand: fine, pareto, linear, gold_ratio.
    head: kind of the early exits' heads: pool, bnpool, plain, conv1, conv2, conv3.
    epochs: passes over the training images.
    batch_size: images per step.
    learning_rate: at the peak of the one-cycle schedule.
    optimizer: adamw, or sgd with Nesterov momentum.
    weight_decay: of the optimiser.
    loss: weighted sum of terms, such as "v0+0.5*correctness", see `eefast.train.losses`.
    cost_weight: λ, the price of cost in the loss term "mixtures" (v2).
    shift: training images are moved at random by at most so many pixels.
    held_out: training images that are not trained on, drawn by the seed; thresholds and accuracies come from them.
    max_accuracy_drop: thresholds give the least cost with at most this drop below the final exit's held-out accuracy.
    max_cost: instead, thresholds give the most accuracy with at most this mean cost.
    seed: of weights, order and held-out images.
    device: auto, cpu, cuda, or what else Lightning calls an accelerator.
    workers: processes that decode images; in-memory data sets need none.
    test: measure the test split once at the end.
    """
    # Where the files lie is no part of what made the network.
    arguments = {name: value for name, value in locals().items() if name not in ("data_root", "output")}
    for name, value, least in (("epochs", epochs, 1), ("batch_size", batch_size, 2), ("held_out", held_out, 1)):
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if not 0 <= max_accuracy_drop <= 1:
        raise ValueError(f"max_accuracy_drop={max_accuracy_drop} must lie in 0 … 1")
    criterion_loss = losses.parse(loss, cost_weight)
    found, output = data.info(dataset), Path(output)
    everything = data.dataset(dataset, data_root, "train", download)
    count = len(everything)  # type: ignore[arg-type]
    if count - held_out < batch_size:
        raise ValueError(f"held_out={held_out} of {count} training images leaves no batch of batch_size={batch_size}")
    test_images = data.dataset(dataset, data_root, "test", download) if test else None

    lightning.seed_everything(seed, workers=True, verbose=False)
    split = torch.Generator().manual_seed(seed)
    train_images, held_out_images = random_split(everything, [count - held_out, held_out], generator=split)
    normalization = (list(found.mean), list(found.std))
    network = zoo.eenet(
        net, num_exits, placement, head, found.num_classes, found.shape, normalization=normalization
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if max_cost is not None and max_cost < network.cost[0]:
        raise ValueError(f"max_cost={max_cost} is less than the first exit costs, {network.cost[0]:.4f}")
    module = EarlyExitModule(
        network,
        criterion_loss,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        shift=shift,
    )
    held_out_batches = _batches(held_out_images, 500, workers)
    lines = _EpochLines()
    with _quiet(), torch.backends.mkldnn.flags(enabled=not _too_narrow_for_onednn(network)):
        trainer = lightning.Trainer(
            accelerator=device,
            devices=1,
            max_epochs=epochs,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=sys.stderr.isatty(),
            num_sanity_val_steps=0,
            callbacks=[lines, *([RichProgressBar(console_kwargs={"stderr": True})] if sys.stderr.isatty() else [])],
        )
        output.mkdir(parents=True, exist_ok=True)
        trainer.fit(module, _batches(train_images, batch_size, workers, shuffle=True), held_out_batches)
        trainer.save_checkpoint(output / "last.ckpt")
    if not trainer.callback_metrics["held_out_loss"].isfinite():
        raise RuntimeError(f"training diverged: the loss is no number; lower learning_rate={learning_rate}")

    network.eval()
    outputs, labels = collect(network, held_out_batches)
    exit_accuracy = [(out.logits.argmax(dim=1) == labels).double().mean().item() for out in outputs]
    bound = {"max_cost": max_cost} if max_cost is not None else {"min_accuracy": exit_accuracy[-1] - max_accuracy_drop}
    chosen = {name: calibrate(outputs, labels, network.cost, name, **bound) for name in CRITERIA}
    network.thresholds.copy_(torch.tensor(chosen[network.criterion.name].thresholds))
    network.save(output)
    tested = None
    if test_images is not None:
        outputs, labels = collect(network, _batches(test_images, 500, workers))
        tested = {
            name: Calibration(name, c.thresholds, *outcome(outputs, labels, network.cost, name, c.thresholds))
            for name, c in chosen.items()
        }
    report = TrainReport(arguments, exit_accuracy, chosen, tested, lines.seconds)
    _write(output / THRESHOLDS_FILE, {name: list(c.thresholds) for name, c in chosen.items()})
    _write(output / REPORT_FILE, asdict(report))
    return report


class _EpochLines(Callback):
    """One line on stderr per epoch, so that a log without a terminal shows the progress too."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        metrics = trainer.callback_metrics
        accuracy = " ".join(f"{100 * v:.2f}" for name, v in metrics.items() if name.startswith("accuracy_exit_"))
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: loss {metrics['loss']:.4f}, "
            f"held-out loss {metrics['held_out_loss']:.4f}, accuracy % by exit {accuracy}, {self.seconds[-1]:.0f} s",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints about hardware and worker processes, which do not fit data in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
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


def _batches(images: Dataset, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader:
    # BatchNorm cannot train on a last batch of one image, so training drops what is left over.
    return DataLoader(images, batch_size, shuffle=shuffle, drop_last=shuffle, num_workers=workers, collate_fn=_collate)


def _collate(batch: Any) -> Any:
    return batch if isinstance(batch, tuple) else default_collate(batch)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
