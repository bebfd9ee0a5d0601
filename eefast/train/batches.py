"""A data set → batches in an order that depends on seed and epoch alone, so that a resumed run has the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.loaders import ImageLoader, collate


class Indexed(Dataset):
    """(image, label, index) of every sample (image, label), so that its exit tag can be looked up."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return (*self.dataset[index], index)

    # DataLoader asks for whole batches through this name.
    def __getitems__(self, indices: Sequence[int]) -> Any:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if fetch else [self.dataset[i] for i in indices]
        if isinstance(samples, tuple):
            return (*samples, torch.as_tensor(indices, dtype=torch.int64))
        return [(*sample, index) for sample, index in zip(samples, indices, strict=True)]


class EpochOrder(Sampler[int]):
    """0 … count - 1 in a random order that depends on seed and epoch alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, self.epoch))
        return iter(torch.randperm(self.count, generator=generator).tolist())


class EpochSeeds(Callback):
    """Before every epoch, all generators of random numbers are seeded from seed and epoch."""

    def __init__(self, seed: int, batches: DataLoader) -> None:
        self.seed, self.batches = seed, batches
        self._start(0)

    # Lightning makes the iterator over the first epoch's batches, with its workers, long before the epoch starts.
    def on_load_checkpoint(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._start(checkpoint["epoch"] + 1)

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self._start(trainer.current_epoch)
        torch.manual_seed(epoch_seed(self.seed, trainer.current_epoch))

    def _start(self, epoch: int) -> None:
        assert isinstance(self.batches.sampler, EpochOrder)
        self.batches.sampler.epoch = epoch
        self.batches.generator.manual_seed(epoch_seed(self.seed, epoch))


def epoch_seed(seed: int, epoch: int) -> int:
    """A different seed for every epoch; seed: 0 … 2³² - 1."""
    return (seed << 24) + epoch


def training_batches(images: Dataset, batch_size: int, seed: int, workers: int) -> DataLoader:
    """Shuffled batches (images, labels [N], indices [N]); use them together with `EpochSeeds`."""
    return ImageLoader(
        Indexed(images),
        batch_size,
        sampler=EpochOrder(len(images), seed),  # type: ignore[arg-type]
        # BatchNorm cannot train on a last batch of one image, so an incomplete last batch is dropped.
        drop_last=True,
        num_workers=workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )
