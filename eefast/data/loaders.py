"""A data set → its training and held-out part, and batches of uint8 images with labels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, default_collate, random_split

from ..system.progress import Progress, counted


def split(images: Dataset, count: int, seed: int) -> tuple[Subset, Subset]:
    """The images that `eefast train` with this seed trains on, and the `count` that it keeps aside for thresholds.

    Raises `ValueError` unless 1 ≤ count ≤ the number of images.
    """
    total = len(images)  # type: ignore[arg-type]
    if not 1 <= count <= total:
        raise ValueError(f"held_out={count} must be in 1 … {total}, the number of training images")
    rest, kept = random_split(images, [total - count, count], generator=torch.Generator().manual_seed(seed))
    return rest, kept


def default_held_out(total: int) -> int:
    """How many of `total` training images `eefast train` keeps aside by default: 5,000, at most a fifth."""
    return min(5000, max(1, total // 5))


def batches(images: Dataset, batch_size: int, workers: int = 0) -> ImageLoader:
    """(uint8 images [n, C, H, W], labels [n]) in the order of the data set, see `datasets.dataset`."""
    return ImageLoader(images, batch_size, num_workers=workers, collate_fn=collate)


class ImageLoader(DataLoader):
    """A `DataLoader` that raises a `RuntimeError` of one line where images cannot be read, also by worker processes."""

    def __iter__(self) -> Any:
        # The iterator is made now, as it draws from the generator of random numbers.
        return self._read(super().__iter__())

    @staticmethod
    def _read(found: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from found
        except MemoryError:
            raise
        except Exception as error:
            # A worker's error has its traceback in its text, and what was raised in the last line.
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise RuntimeError(f"images could not be read: {why}") from error

    def reported(self, what: str, progress: Progress) -> Iterator[Any]:
        """The batches, with the number of images done reported after each."""
        total = len(self.dataset)  # type: ignore[arg-type]
        return counted(self, what, progress, total, lambda batch: len(batch[1]))


def collate(batch: Any) -> tuple[Any, ...]:
    """A batch from samples; data sets in memory give whole batches, which are not changed."""
    return batch if isinstance(batch, tuple) else tuple(default_collate(batch))
