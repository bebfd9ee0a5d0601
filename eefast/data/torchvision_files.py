"""The published files of SVHN and CIFAR-10 → images in memory, as torchvision reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .image_sets import ImageTensors
from .sources import how_to_get


def load_svhn(root: Path, split: str, download: bool, info: object) -> Dataset:
    try:
        import scipy.io  # noqa: F401  torchvision reads SVHN's .mat files with it
    except ImportError as error:
        raise ImportError("SVHN's files are MATLAB files; reading them needs scipy: pip install scipy") from error
    from torchvision.datasets import SVHN

    *_, name, md5 = SVHN.split_list[split]
    with _explained("svhn", {root / name: md5}):
        loaded = SVHN(str(root), split=split, download=download)
    return ImageTensors(torch.from_numpy(loaded.data), torch.from_numpy(loaded.labels).to(torch.int64))


def load_cifar10(root: Path, split: str, download: bool, info: object) -> Dataset:
    from torchvision.datasets import CIFAR10

    published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    with _explained("cifar10", {root / CIFAR10.base_folder / name: md5 for name, md5 in published}):
        loaded = CIFAR10(str(root), train=split == "train", download=download)
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.tensor(loaded.targets, dtype=torch.int64))


@contextmanager
def _explained(name: str, files: Mapping[Path, str]) -> Iterator[None]:
    """Turns torchvision's "not found or corrupted" into an error that names the files and says how to get them.

    files: path → MD5 of the published file.
    """
    try:
        yield
    except RuntimeError as error:
        wrong = [
            f"{path} is {'damaged' if path.is_file() else 'missing'}"
            for path, md5 in files.items()
            if not path.is_file() or hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5
        ]
        raise FileNotFoundError(f"{', '.join(wrong) or error}; {how_to_get(name)}") from error
