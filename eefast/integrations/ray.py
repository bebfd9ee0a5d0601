"""Batches of Ray Data → the same batches with the network's answers: a class for `Dataset.map_batches`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..api import accelerate
from ..checkpoint.loading import load
from ..data.cropping import pixels
from ..data.decoding import decode_bytes
from ..scoring.preparation import preprocessing_of

ADDED = ("label", "exit", "confidence", "cost")


class Score:
    """An actor that adds the columns label, exit, confidence and cost:

    ds.map_batches(Score, fn_constructor_args=("runs/mine",), compute=ActorPoolStrategy(size=2), num_cpus=1)

    Actors that take all CPUs of a cluster leave none for reading, and Ray then waits for ever: keep one free.

    folder: of the network; image_column: holds contents of image files, or uint8 pixels [C, H, W].
    keep_images: keep that column. engine, crop_fraction, stages: as in `eefast.score`.
    Raises `ValueError` for an image that cannot be read, and names its row in the batch; and for a batch that has one
    of the added columns already.
    """

    def __init__(
        self,
        folder: str | Path,
        image_column: str = "image",
        *,
        keep_images: bool = False,
        engine: str = "auto",
        crop_fraction: float | None = None,
        stages: str = "auto",
    ) -> None:
        self.net = load(folder)
        self.image_column, self.keep_images, self.crop_fraction = image_column, keep_images, crop_fraction
        self.fast = accelerate(self.net, engine=engine, frozen=True, stages=stages)
        self.fast.warmup()

    def __call__(self, batch: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """batch: a column of images and any others, each [n, …]; they are not changed."""
        if self.image_column not in batch:
            raise ValueError(f"image_column={self.image_column!r} is none of the columns {', '.join(batch)}")
        kept = {name: column for name, column in batch.items() if self.keep_images or name != self.image_column}
        if taken := [name for name in ADDED if name in kept]:
            new = {name: f"true_{name}" for name in taken}
            raise ValueError(
                f"the batch has a column {taken[0]!r} already, which would be lost; rename before map_batches, such as "
                f"ds.rename_columns({new})"
            )
        answer = self.fast(self._pixels(batch[self.image_column]))
        values = answer.labels, answer.exit_index, answer.confidence, answer.cost
        return {**kept, **{name: value.numpy() for name, value in zip(ADDED, values, strict=True)}}

    def _pixels(self, images: np.ndarray[Any, Any]) -> torch.Tensor:
        if images.dtype == np.uint8:
            return torch.from_numpy(images.copy())  # Ray's arrays are read-only
        found = list(images)
        if not all(isinstance(image, np.ndarray) for image in found):
            how, shape = preprocessing_of(self.net, self.crop_fraction), self.net.input_shape
            found = [
                image if isinstance(image, np.ndarray) else pixels(decode_bytes(image, f"row {i}"), shape, how)
                for i, image in enumerate(found)
            ]
        return torch.from_numpy(np.stack(found)) if found else torch.empty(0, *self.net.input_shape, dtype=torch.uint8)
