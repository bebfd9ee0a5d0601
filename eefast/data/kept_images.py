"""Files of small images → the same data set, but each image is decoded once and then kept in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .image_sets import ImageFiles

MOST_BYTES = 512 * 2**20
"""Larger data sets are not kept in memory."""


def fits(count: int, shape: Sequence[int]) -> bool:
    """Whether `count` images of (C, H, W) bytes are few enough to be kept."""
    return count * torch.Size(shape).numel() <= MOST_BYTES


class KeptImages(ImageFiles):
    """Image files that are decoded when they are first asked for; training does not change them while it decodes.

    shape: (C, H, W) of what `transform` returns. Processes that decode keep what they have decoded themselves, until
    they end, so data sets of this kind are read fastest without any.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        transform: Callable[[Any], Tensor],
        shape: Sequence[int],
        classes: Sequence[str] | None = None,
        resize: int | None = None,
        shift: int = 0,
    ) -> None:
        super().__init__(samples, transform, None, classes, resize, shift)
        # Memory that nothing has been written to takes no room.
        self._images = torch.empty(len(self.samples), *shape, dtype=torch.uint8)
        self._kept = torch.zeros(len(self.samples), dtype=torch.bool)
        self._labels = torch.tensor([label for _, label in self.samples], dtype=torch.int64)

    def for_training(self) -> KeptImages:
        return self

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self._kept[index]:
            self._images[index], _ = super().__getitem__(index)
            self._kept[index] = True
        return self._images[index], int(self._labels[index])

    # DataLoader asks for whole batches through this name.
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        for index in chosen[~self._kept[chosen]].tolist():
            self[index]
        return self._images[chosen], self._labels[chosen]
