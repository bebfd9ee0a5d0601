"""Photographs in folders of classes (Tiny-ImageNet, ImageNet, the user's) → labelled files, cut to one size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch.utils.data import Dataset

from ..preprocessing import Preprocessing, shorter_side
from . import kept_images
from .cropping import prepared
from .decoding import size_of
from .image_files import class_folders, difference, image_paths, refuse_splits, shown
from .image_sets import ImageFiles
from .sources import how_to_get

if TYPE_CHECKING:
    from .datasets import DatasetInfo

PROBED = 64
"""Images of a folder whose size is looked at, spread evenly over all of them."""

SMALL = 64
"""Images of up to this height and width are shifted in training, as those of CIFAR-10 are, where they need no resizing;
photographs are cropped at random sizes."""


def load_tiny_imagenet(root: Path, split: str, download: bool, info: DatasetInfo) -> Dataset:
    from torchvision.transforms.functional import pil_to_tensor

    folder = next((f for f in (root, root / "tiny-imagenet-200") if (f / "train").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no tiny-imagenet-200/train or train in {root}; {how_to_get('tiny-imagenet')}")
    classes = [entry.name for entry in class_folders(folder / "train")]
    _check_count("tiny-imagenet", folder / "train", classes, info.num_classes)
    label = {name: i for i, name in enumerate(classes)}
    if split == "train":
        samples = [(path, label[c]) for c in classes for path in sorted(image_paths(folder / "train" / c / "images"))]
    else:
        annotations = folder / "val" / "val_annotations.txt"
        if not annotations.is_file():
            raise FileNotFoundError(f"{annotations} is missing; it names the class of every validation image")
        rows = [line.split("\t") for line in annotations.read_text(errors="replace").splitlines() if line.strip()]
        unknown = sorted({row[1] if len(row) > 1 else row[0] for row in rows if len(row) < 2 or row[1] not in label})
        if unknown:
            raise ValueError(f"{annotations} names classes that train/ does not have: {', '.join(unknown[:5])}")
        there = {path.name for path in image_paths(folder / "val" / "images")}
        if missing := sorted({row[0] for row in rows} - there):
            raise FileNotFoundError(
                f"{annotations} names {len(missing)} images that {folder / 'val' / 'images'} does not have, such as "
                f"{shown(missing[0])}; get the data set again"
            )
        samples = [(folder / "val" / "images" / row[0], label[row[1]]) for row in rows]
    if not samples:
        raise FileNotFoundError(f"{folder} has no images of the {split} split; {how_to_get('tiny-imagenet')}")
    return ImageFiles(samples, pil_to_tensor, classes=classes)


def load_class_folders(name: str, root: Path, split: str, download: bool, info: DatasetInfo) -> Dataset:
    from torchvision import transforms

    size, num_classes = info.shape[1], info.num_classes
    folders = class_folders_of(name, root, split, num_classes)
    classes = [folder.name for folder in folders]
    if split == "test" and (root / "train").is_dir():
        expected = [folder.name for folder in class_folders_of(name, root, "train", num_classes)]
        if different := difference(classes, expected):
            raise ValueError(f"{folders[0].parent} and {root / 'train'} differ in classes: {different}")
    samples = [(path, label) for label, folder in enumerate(folders) for path in sorted(image_paths(folder))]
    whole = name == "folder" and info.resize in (None, size) and _have_size(samples, size)
    resize = info.resize or (size if whole else shorter_side(info.shape))
    unchanged = partial(prepared, shape=info.shape, how=Preprocessing(resize))
    if not whole or size > SMALL:
        crop = transforms.Compose([transforms.RandomResizedCrop(size), transforms.PILToTensor()])
        return ImageFiles(samples, unchanged, crop, classes, resize)
    shift = size // 8
    if kept_images.fits(len(samples), info.shape):
        return kept_images.KeptImages(samples, unchanged, info.shape, classes, resize, shift)
    return ImageFiles(samples, unchanged, None, classes, resize, shift)


def _have_size(samples: Sequence[tuple[Path, int]], size: int) -> bool:
    """Whether a folder's images already have the height and width that are wanted: these are taken whole."""
    some = samples[:: max(1, len(samples) // PROBED)]
    return bool(some) and all(size_of(path) == (size, size) for path, _ in some)


def class_folders_of(name: str, root: Path, split: str, num_classes: int = 0) -> list[Path]:
    """The folders of the classes, sorted by name as torchvision's ImageFolder does.

    num_classes: how many there must be, 0 for any number.
    """
    names = {"train": ["train"], "test": ["val"] if name == "imagenet" else ["val", "test"]}[split]
    found = next((root / part for part in names if (root / part).is_dir()), None)
    flat = found is None and (name, split) == ("folder", "train") and not (root / "val").is_dir() and root.is_dir()
    folder = root if flat else found
    classes = class_folders(folder) if folder is not None else []
    if not classes:
        raise FileNotFoundError(f"no folders of classes in {root / ' or '.join(names)}; {how_to_get(name)}")
    if flat:
        refuse_splits(root, classes)
    if num_classes:
        _check_count(name, classes[0].parent, [entry.name for entry in classes], num_classes)
    return classes


def _check_count(name: str, folder: Path, classes: Sequence[str], num_classes: int) -> None:
    """Labels are indices into the sorted list of classes, so a missing class shifts the labels of all later ones."""
    if len(classes) != num_classes:
        raise ValueError(
            f"{folder} has {len(classes)} classes, {name} has {num_classes}; get the whole data set, or "
            "use its folders as a data set of your own: dataset='folder' (--dataset folder)"
        )
