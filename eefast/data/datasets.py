"""The name of a data set → its shape, classes, statistics and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ..record import TrainingRecord
from .image_sets import class_names, fingerprint, resize_of
from .mnist import load_mnist
from .photographs import class_folders_of, load_class_folders, load_tiny_imagenet
from .sources import how_to_get
from .torchvision_files import load_cifar10, load_svhn

SPLITS = ("train", "test")
# Data sets whose images come in all sizes.
RESIZED = ("imagenet", "folder")


@dataclass(frozen=True)
class DatasetInfo:
    """What a network needs of a data set.

    shape: (C, H, W) of the images.
    num_classes: labels are 0 … num_classes - 1; 0 for "folder", where `info` counts them.
    mean, std: per channel, on the scale 0 … 1.
    load: (root, split, download, this value) → data set of (uint8 image, label).
    shift, flip: how the papers change training images, see `eefast.train.module.EarlyExitModule`; photographs are also
        cropped at random sizes while they are decoded, small images of "folder" shifted (`ImageFiles.shift`).
    resize: pixels of the shorter side of photographs before their centre is cut out; None for the usual one.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path, str, bool, Any], Dataset]
    shift: int = 0
    flip: bool = False
    resize: int | None = None


def record(
    network: str, num_classes: int, input_shape: Sequence[int], name: str, images: Dataset, held_out: int, seed: int
) -> TrainingRecord:
    """The record of a training: `images` is the whole training part of the data set `name`."""
    count = len(images)  # type: ignore[arg-type]
    known = class_names(images), resize_of(images), count, fingerprint(images)
    return TrainingRecord(network, num_classes, tuple(input_shape), name, *known, held_out, seed)


NOT_FETCHED = ("tiny-imagenet", "imagenet", "folder")
"""Data sets that `download` cannot fetch."""


def dataset(
    name: str,
    root: str | Path,
    split: str,
    download: bool = False,
    image_size: int | None = None,
    resize: int | None = None,
) -> Dataset:
    """The data set called `name` (see `DATASETS`) from the folder `root`: (uint8 image [C, H, W], label) per sample.

    split: "train" or "test"; "test" is the labelled validation images where the test labels are secret
        (Tiny-ImageNet, ImageNet).
    download: fetch missing files into `root`, through torchvision; without it nothing is fetched.
    image_size: see `info`.
    resize: pixels of the shorter side of photographs before their centre is cut out; by default 256/224 of the centre,
        or of "folder" the images as they are, where they already have the size of the centre.
    Raises `ValueError` for unknown names, splits and malformed files, `FileNotFoundError` for missing ones, saying how
    to get them.
    """
    check_name(name)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    root = Path(root).expanduser()
    if not root.is_dir() and not download:
        raise FileNotFoundError(f"the data folder {root} does not exist; {how_to_get(name)}")
    if download and name in NOT_FETCHED:
        raise ValueError(f"download=True is not possible for {name}: {how_to_get(name)}")
    found = replace(_sized(name, image_size), resize=resize if name in RESIZED else None)
    return found.load(root, split, download, found)


def info(name: str, root: str | Path | None = None, image_size: int | None = None) -> DatasetInfo:
    """Shape, classes and normalisation of the data set called `name`; `ValueError` lists the known names.

    root: the folder whose classes are counted; needed for "folder" only.
    image_size: height and width of photographs ("imagenet", "folder") after resizing, by default 224.
    """
    found = _sized(name, image_size)
    if name != "folder":
        return found
    if root is None:
        raise ValueError("dataset='folder' needs root: its classes are the folders there")
    return replace(found, num_classes=len(class_folders_of(name, Path(root).expanduser(), "train")))


def _sized(name: str, image_size: int | None) -> DatasetInfo:
    check_name(name)
    if name not in RESIZED:
        if image_size is not None:
            raise ValueError(f"image_size={image_size}: the images of {name} have one size; leave it out")
        return DATASETS[name]
    size = 224 if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size={size} must be at least 1")
    return replace(DATASETS[name], shape=(3, size, size))


def check_name(name: str) -> None:
    """`ValueError` that lists the known names, unless `name` is one of them."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")


_PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DATASETS = {
    "mnist": DatasetInfo((1, 28, 28), 10, (0.1307,), (0.3081,), partial(load_mnist, "mnist", "MNIST")),
    "fashion-mnist": DatasetInfo(
        (1, 28, 28), 10, (0.2860,), (0.3530,), partial(load_mnist, "fashion-mnist", "FashionMNIST")
    ),
    "svhn": DatasetInfo((3, 32, 32), 10, *_HALF, load_svhn),
    "cifar10": DatasetInfo((3, 32, 32), 10, *_CIFAR10, load_cifar10, shift=4, flip=True),
    "tiny-imagenet": DatasetInfo((3, 64, 64), 200, *_HALF, load_tiny_imagenet, flip=True),
    "imagenet": DatasetInfo((3, 224, 224), 1000, *_PHOTOGRAPHS, partial(load_class_folders, "imagenet"), flip=True),
    # The number of classes is counted, see `info`.
    "folder": DatasetInfo((3, 224, 224), 0, *_PHOTOGRAPHS, partial(load_class_folders, "folder"), flip=True),
}
