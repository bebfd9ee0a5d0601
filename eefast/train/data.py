"""Image data sets as uint8 tensors [N, C, H, W] and int64 labels, from files in their published layouts."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from importlib.abc import Traversable

SPLITS = ("train", "test")


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
    """

    def __init__(self, samples: Sequence[tuple[str | Path, int]], transform: Callable[[Any], Tensor]) -> None:
        self.samples, self.transform = list(samples), transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.datasets.folder import pil_loader

        path, label = self.samples[index]
        return self.transform(pil_loader(path)), label


@dataclass(frozen=True)
class DatasetInfo:
    """What a network must know about a data set.

    shape: (C, H, W) of the images.
    num_classes: labels are 0 … num_classes - 1.
    mean, std: per channel, on the scale 0 … 1.
    load: (root, split, download) → data set of (uint8 image, label).
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path, str, bool], Dataset]


def dataset(name: str, root: str | Path, split: str, download: bool = False) -> Dataset:
    """The data set called `name` (see `DATASETS`) from the folder `root`: (uint8 image [C, H, W], label) per sample.

    split: "train" or "test"; the labelled validation images stand for "test" where the test labels are secret
        (Tiny-ImageNet, ImageNet).
    download: fetch missing files into `root`, through torchvision; without it nothing is ever fetched.
    Raises `ValueError` for unknown names, splits and malformed files, `FileNotFoundError` for missing ones, saying how
    to get them.
    """
    found = info(name)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    root = Path(root).expanduser()
    if not root.is_dir() and not download:
        raise FileNotFoundError(f"the data folder {root} does not exist; {_how_to_get(name)}")
    return found.load(root, split, download)


def info(name: str) -> DatasetInfo:
    """Shape, classes and normalisation of the data set called `name`; `ValueError` lists the names there are."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[name]


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
            raise ValueError(f"{path} is not a whole gzip file ({error}); get it again") from error
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
    return ImageTensors(x.unsqueeze(1), y.to(torch.int64))


def _mnist_like(name: str, torchvision_name: str) -> Callable[[Path, str, bool], Dataset]:
    def load(root: Path, split: str, download: bool) -> Dataset:
        stem = "train" if split == "train" else "t10k"
        folders = [root, root / name, root / torchvision_name / "raw", root / "raw"]
        if download and not any(_with_gz(folder / f"{stem}-images-idx3-ubyte") for folder in folders):
            import torchvision

            getattr(torchvision.datasets, torchvision_name)(root, download=True)
        for folder in folders:
            images, labels = (_with_gz(folder / f"{stem}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
            if images and labels:
                return _idx_pair(images, labels)
        raise FileNotFoundError(
            f"no {stem}-images-idx3-ubyte and {stem}-labels-idx1-ubyte (plain or .gz) in {root} or its folders "
            f"{name}/, {torchvision_name}/raw/, raw/; {_how_to_get(name)}"
        )

    return load


def _with_gz(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(path.name + ".gz")) if p.is_file()), None)


def _svhn(root: Path, split: str, download: bool) -> Dataset:
    try:
        import scipy.io  # noqa: F401  torchvision reads SVHN's .mat files with it
    except ImportError as error:
        raise ImportError("SVHN's files are MATLAB files; reading them needs scipy: pip install scipy") from error
    from torchvision.datasets import SVHN

    with _explained("svhn"):
        loaded = SVHN(str(root), split=split, download=download)
    return ImageTensors(torch.from_numpy(loaded.data), torch.from_numpy(loaded.labels).to(torch.int64))


def _cifar10(root: Path, split: str, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10

    with _explained("cifar10"):
        loaded = CIFAR10(str(root), train=split == "train", download=download)
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.tensor(loaded.targets, dtype=torch.int64))


def _tiny_imagenet(root: Path, split: str, download: bool) -> Dataset:
    from torchvision.transforms.functional import pil_to_tensor

    _refuse_download("tiny-imagenet", download)
    folder = next((f for f in (root, root / "tiny-imagenet-200") if (f / "train").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no tiny-imagenet-200/train or train in {root}; {_how_to_get('tiny-imagenet')}")
    classes = sorted(entry.name for entry in (folder / "train").iterdir() if entry.is_dir())
    label = {name: i for i, name in enumerate(classes)}
    if split == "train":
        files = {c: sorted((folder / "train" / c / "images").glob("*.JPEG")) for c in classes}
        samples = [(path, label[c]) for c in classes for path in files[c]]
    else:
        annotations = folder / "val" / "val_annotations.txt"
        if not annotations.is_file():
            raise FileNotFoundError(f"{annotations} is missing; it names the class of every validation image")
        rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
        unknown = sorted({row[1] if len(row) > 1 else row[0] for row in rows if len(row) < 2 or row[1] not in label})
        if unknown:
            raise ValueError(f"{annotations} names classes that train/ does not have: {', '.join(unknown[:5])}")
        samples = [(folder / "val" / "images" / row[0], label[row[1]]) for row in rows]
    if not samples:
        raise FileNotFoundError(f"{folder} has no images of the {split} split; {_how_to_get('tiny-imagenet')}")
    return ImageFiles(samples, pil_to_tensor)


def _imagenet(root: Path, split: str, download: bool) -> Dataset:
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    _refuse_download("imagenet", download)
    folder = root / ("train" if split == "train" else "val")
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; {_how_to_get('imagenet')}")
    centre = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    return ImageFiles(ImageFolder(str(folder)).samples, centre)


class _explained:  # noqa: N801  reads as a word in `with _explained(...)`
    """Turns torchvision's "not found or corrupted" into an error that says how to get the data."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            raise FileNotFoundError(f"{error}; {_how_to_get(self.name)}") from error


def _refuse_download(name: str, download: bool) -> None:
    if download:
        raise ValueError(f"download=True is not possible for {name}: {_how_to_get(name)}")


def _how_to_get(name: str) -> str:
    if name == "tiny-imagenet":
        return "get tiny-imagenet-200.zip from Stanford's CS231n course page and unpack it there"
    if name == "imagenet":
        return "ask image-net.org for ILSVRC2012 and sort it into train/<class>/ and val/<class>/"
    return "download=True (--download) fetches it there, or name the folder that holds the published files"


DATASETS = {
    "mnist": DatasetInfo((1, 28, 28), 10, (0.1307,), (0.3081,), _mnist_like("mnist", "MNIST")),
    "fashion-mnist": DatasetInfo((1, 28, 28), 10, (0.2860,), (0.3530,), _mnist_like("fashion-mnist", "FashionMNIST")),
    "svhn": DatasetInfo((3, 32, 32), 10, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), _svhn),
    "cifar10": DatasetInfo((3, 32, 32), 10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), _cifar10),
    "tiny-imagenet": DatasetInfo((3, 64, 64), 200, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), _tiny_imagenet),
    "imagenet": DatasetInfo((3, 224, 224), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), _imagenet),
}
