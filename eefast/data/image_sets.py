"""Images and labels as data sets: in memory, or as files that are decoded when they are asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .decoding import decode


class ImageTensors(Dataset):
    """Images and labels in memory, fetched a batch at a time instead of sample by sample.

    images: [N, C, H, W] uint8.
    labels: [N] int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images and {len(labels)} labels: the files do not belong together")
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    # DataLoader asks for whole batches through this name.
    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self[torch.as_tensor(indices, dtype=torch.int64)]


class ImageFiles(Dataset):
    """Image files that are decoded when they are asked for.

    samples: (path, label) of every image.
    transform: PIL image → uint8 tensor [C, H, W].
    training_transform: the same with random changes, if training makes any while it decodes.
    classes: their names in the order of the labels, where folders give them names.
    resize: see `Preprocessing`; None where images are not resized.
    shift: largest random shift of training images in pixels that suits them, where they are not cropped.
    A sample that cannot be read whole raises `ImageFileError`, which names its file.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        transform: Callable[[Any], Tensor],
        training_transform: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] | None = None,
        resize: int | None = None,
        shift: int = 0,
    ) -> None:
        self.samples, self.transform = list(samples), transform
        self.training_transform = training_transform or transform
        self.classes, self.resize = None if classes is None else tuple(classes), resize
        self.shift = shift

    def for_training(self) -> ImageFiles:
        """The same images, randomly changed while they are decoded."""
        return ImageFiles(
            self.samples, self.training_transform, classes=self.classes, resize=self.resize, shift=self.shift
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(decode(path)), label


def class_names(images: Dataset) -> tuple[str, ...] | None:
    """The names of the classes in the order of the labels; None for data sets without folders of classes."""
    return images.classes if isinstance(images, ImageFiles) else None


def resize_of(images: Dataset) -> int | None:
    """Pixels of the shorter side of photographs before their centre is cut out; None where images are not resized."""
    return images.resize if isinstance(images, ImageFiles) else None


def fingerprint(images: Dataset) -> str:
    """A hash of all labels in their order, and of the names of the files and of their folders.

    images: an `ImageTensors` or `ImageFiles`. It changes with the data set, the number and the order of its images, not
    with its place on disk.
    """
    state = hashlib.sha256()
    if isinstance(images, ImageTensors):
        state.update(images.labels.numpy().tobytes())
    elif isinstance(images, ImageFiles):
        for path, label in images.samples:
            state.update(f"{label}/{Path(path).parent.name}/{Path(path).name}\n".encode("utf-8", "surrogateescape"))
    else:
        raise TypeError(f"images is a {type(images).__name__}; give what dataset(…) returns")
    return state.hexdigest()[:16]
