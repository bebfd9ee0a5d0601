"""The name of a data set in rows → its images, and the options with which `eefast train` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from eefast.data import datasets
from eefast.record import TrainingRecord

CIFAR10_JPEG = "CIFAR-10 (JPEG copy)"
"""All images of CIFAR-10, compressed once as JPEG: train/<class>/ and test/<class>/ in the folder `CIFAR10_FOLDER`."""
CIFAR10_FOLDER = "cifar10-jpeg"
CIFAR10_OPTIONS = {"dataset": "folder", "image_size": 32, "crop_fraction": 1.0}
CIFAR10_FINGERPRINT = "da0e7f4be089d2f3"


def options_of(name: str) -> dict[str, Any]:
    return dict(CIFAR10_OPTIONS) if name == CIFAR10_JPEG else {"dataset": name}


def root_of(name: str, root: Path) -> Path:
    """The folder that holds the data set, below the folder of all data sets; `FileNotFoundError` says how to get it."""
    if name != CIFAR10_JPEG:
        return root
    folder = root / CIFAR10_FOLDER
    if not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"{folder} has no train/ and test/ with the images of {name}; unpack images.tar.xz there: "
            f"tar -xf images.tar.xz -C {folder}"
        )
    return folder


def open_images(name: str, root: Path, split: str) -> Dataset:
    """root: of all data sets; split: "train" or "test"."""
    if name != CIFAR10_JPEG:
        return datasets.dataset(name, root, split)
    size = CIFAR10_OPTIONS["image_size"]
    return datasets.dataset("folder", root_of(name, root), split, image_size=size, resize=size)  # type: ignore[arg-type]


def name_of(record: TrainingRecord) -> str:
    """That of the images that a network was trained on."""
    return CIFAR10_JPEG if record.fingerprint == CIFAR10_FINGERPRINT else record.dataset
