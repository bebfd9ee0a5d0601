"""The idx files of MNIST and Fashion-MNIST → images in memory; MNIST's test images ship with the package."""

from __future__ import annotations

import gzip
import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image_sets import ImageTensors, fingerprint
from .sources import how_to_get

if TYPE_CHECKING:
    from importlib.abc import Traversable

# Published label files, by `fingerprint`: MNIST's and Fashion-MNIST's have the same names and shapes.
PUBLISHED_LABELS = {
    "e474323ac02fc156": "mnist",
    "2fd8de6bdb8d1178": "mnist",
    "e3245b63f7c40d1c": "fashion-mnist",
    "d51d859896c55775": "fashion-mnist",
}


def mnist_test() -> tuple[Tensor, Tensor]:
    """The 10,000 MNIST test images that ship with the package: [10000, 1, 28, 28] uint8 and [10000] int64."""
    folder = resources.files("eefast") / "assets" / "mnist"
    tensors = _idx_pair(folder / "t10k-images-idx3-ubyte.gz", folder / "t10k-labels-idx1-ubyte.gz")
    return tensors.images, tensors.labels


def read_idx(path: Path | Traversable) -> Tensor:
    """The uint8 tensor in an idx file, gzipped if its name ends in ".gz".

    Format (Y. LeCun): two zero bytes, the type (8 = unsigned byte), the number of dimensions, their sizes as big-endian
    32-bit integers, then the values, last dimension fastest.
    Raises `ValueError` for anything else, in particular for files that are too short or too long.
    """
    data = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete gzip file ({error}); get it again") from error
    if len(data) < 4 or data[:2] != b"\0\0":
        raise ValueError(f"{path} is not an idx file: it starts with {data[:4].hex(' ') or 'nothing'}")
    kind, rank = data[2], data[3]
    if kind != 8:
        raise ValueError(f"{path} holds values of idx type {kind:#04x}; only unsigned bytes (0x08) are read")
    start = 4 + 4 * rank
    if rank == 0 or len(data) < start:
        raise ValueError(f"{path} is not an idx file: {len(data)} bytes cannot hold a header of {rank} dimensions")
    shape = [int.from_bytes(data[4 * i : 4 * i + 4], "big") for i in range(1, rank + 1)]
    size = 1
    for length in shape:
        size *= length
    if len(data) - start != size:
        raise ValueError(f"{path} has {len(data) - start} values, its header promises {size}; get the file again")
    if size == 0:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).view(shape)


def _idx_pair(images: Path | Traversable, labels: Path | Traversable) -> ImageTensors:
    x, y = read_idx(images), read_idx(labels)
    if x.shape[1:] != (28, 28):
        raise ValueError(f"{images} has shape {tuple(x.shape)}; expected [N, 28, 28]")
    if y.dim() != 1 or (len(y) and int(y.max()) > 9):
        raise ValueError(f"{labels} has shape {tuple(y.shape)}; expected [N] labels 0 … 9")
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images and {len(y)} labels: {images} and {labels} do not belong together")
    return ImageTensors(x.unsqueeze(1), y.to(torch.int64))


def load_mnist(name: str, torchvision_name: str, root: Path, split: str, download: bool, info: object) -> Dataset:
    """The data set `name`, plain or gzipped, from `root`, one of its usual folders, or fetched by torchvision."""
    stem = "train" if split == "train" else "t10k"
    folders = [root, root / name, root / torchvision_name / "raw", root / "raw"]
    if download and not any(_with_gz(folder / f"{stem}-images-idx3-ubyte") for folder in folders):
        import torchvision

        getattr(torchvision.datasets, torchvision_name)(root, download=True)
    for folder in folders:
        images, labels = (_with_gz(folder / f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        if images and labels:
            found = _idx_pair(images, labels)
            other = PUBLISHED_LABELS.get(fingerprint(found), name)
            if other != name:
                raise ValueError(f"{labels} has the labels of {other}, not of {name}; name the folder of {name}")
            return found
    raise FileNotFoundError(
        f"no {stem}-images-idx3-ubyte and {stem}-labels-idx1-ubyte (plain or .gz) in {root} or its folders "
        f"{name}/, {torchvision_name}/raw/, raw/; {how_to_get(name)}"
    )


def _with_gz(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)
