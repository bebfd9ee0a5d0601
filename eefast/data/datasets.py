"""Image data sets as uint8 tensors [N, C, H, W] and int64 labels, from files in their published layouts."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..record import TrainingRecord
from .image_files import class_folders, decode, difference, image_paths, refuse_splits, shown

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
    training_transform: the same with random changes, if there are any at this place.
    classes: their names in the order of the labels, where folders give them names.
    A sample that cannot be read whole raises `ImageFileError`, which names its file.
    """

    def __init__(
        self,
        samples: Sequence[tuple[str | Path, int]],
        transform: Callable[[Any], Tensor],
        training_transform: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.samples, self.transform = list(samples), transform
        self.training_transform = training_transform or transform
        self.classes = None if classes is None else tuple(classes)

    def for_training(self) -> ImageFiles:
        """The same images, randomly changed while they are decoded."""
        return ImageFiles(self.samples, self.training_transform, classes=self.classes)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(decode(path)), label


def class_names(images: Dataset) -> tuple[str, ...] | None:
    """The names of the classes in the order of the labels; None for data sets without folders of classes."""
    return images.classes if isinstance(images, ImageFiles) else None


def fingerprint(images: Dataset) -> str:
    """A hash of what stands at which place: of all labels, and of the names of files and of their folders.

    images: an `ImageTensors` or `ImageFiles`. It changes with the data set, the number and the order of its images, not
    with the folder that it lies in.
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


@dataclass(frozen=True)
class DatasetInfo:
    """What a network must know about a data set.

    shape: (C, H, W) of the images.
    num_classes: labels are 0 … num_classes - 1.
    mean, std: per channel, on the scale 0 … 1.
    load: (root, split, download) → data set of (uint8 image, label).
    shift, flip: how the papers change training images, see `eefast.train.module.EarlyExitModule`; photographs are also
        cropped at random sizes while they are decoded.
    """

    shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    load: Callable[[Path, str, bool], Dataset]
    shift: int = 0
    flip: bool = False


def resize(name: str, size: int) -> int | None:
    """Pixels of the shorter side of a photograph before its centre is cut out to `size`; None for other images."""
    return round(size * 256 / 224) if name in ("imagenet", "folder") else None


def record(
    network: str, num_classes: int, input_shape: Sequence[int], name: str, images: Dataset, held_out: int, seed: int
) -> TrainingRecord:
    """What is to be known of a training: `images` is the whole training part of the data set `name`."""
    count = len(images)  # type: ignore[arg-type]
    known = class_names(images), resize(name, input_shape[1]), count, fingerprint(images)
    return TrainingRecord(network, num_classes, tuple(input_shape), name, *known, held_out, seed)


def dataset(name: str, root: str | Path, split: str, download: bool = False, image_size: int | None = None) -> Dataset:
    """The data set called `name` (see `DATASETS`) from the folder `root`: (uint8 image [C, H, W], label) per sample.

    split: "train" or "test"; the labelled validation images stand for "test" where the test labels are secret
        (Tiny-ImageNet, ImageNet).
    download: fetch missing files into `root`, through torchvision; without it nothing is ever fetched.
    image_size: see `info`.
    Raises `ValueError` for unknown names, splits and malformed files, `FileNotFoundError` for missing ones, saying how
    to get them.
    """
    check_name(name)
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    root = Path(root).expanduser()
    if not root.is_dir() and not download:
        raise FileNotFoundError(f"the data folder {root} does not exist; {_how_to_get(name)}")
    if download and name in ("tiny-imagenet", "imagenet", "folder"):
        raise ValueError(f"download=True is not possible for {name}: {_how_to_get(name)}")
    return _sized(name, image_size).load(root, split, download)


def info(name: str, root: str | Path | None = None, image_size: int | None = None) -> DatasetInfo:
    """Shape, classes and normalisation of the data set called `name`; `ValueError` lists the names there are.

    root: the folder whose classes are counted; needed for "folder" only.
    image_size: height and width to which photographs ("imagenet", "folder") are brought, by default 224.
    """
    found = _sized(name, image_size)
    if name != "folder":
        return found
    if root is None:
        raise ValueError("dataset='folder' needs root: its classes are the folders there")
    return replace(found, num_classes=len(_class_folders(name, Path(root).expanduser(), "train")))


def _sized(name: str, image_size: int | None) -> DatasetInfo:
    check_name(name)
    if name not in ("imagenet", "folder"):
        if image_size is not None:
            raise ValueError(f"image_size={image_size}: the images of {name} have one size; leave it out")
        return DATASETS[name]
    size = 224 if image_size is None else image_size
    if size < 1:
        raise ValueError(f"image_size={size} must be at least 1")
    return replace(DATASETS[name], shape=(3, size, size), load=partial(_image_folder, name, size=size))


def check_name(name: str) -> None:
    """`ValueError` that lists the names there are, unless `name` is one of them."""
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is unknown; choose one of {', '.join(DATASETS)}")


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
    if len(x) != len(y):
        raise ValueError(f"{len(x)} images and {len(y)} labels: {images} and {labels} do not belong together")
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
                found = _idx_pair(images, labels)
                other = PUBLISHED_LABELS.get(fingerprint(found), name)
                if other != name:
                    raise ValueError(f"{labels} has the labels of {other}, not of {name}; name the folder of {name}")
                return found
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

    *_, name, md5 = SVHN.split_list[split]
    with _explained("svhn", {root / name: md5}):
        loaded = SVHN(str(root), split=split, download=download)
    return ImageTensors(torch.from_numpy(loaded.data), torch.from_numpy(loaded.labels).to(torch.int64))


def _cifar10(root: Path, split: str, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10

    published = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    with _explained("cifar10", {root / CIFAR10.base_folder / name: md5 for name, md5 in published}):
        loaded = CIFAR10(str(root), train=split == "train", download=download)
    images = torch.from_numpy(loaded.data).permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.tensor(loaded.targets, dtype=torch.int64))


def _tiny_imagenet(root: Path, split: str, download: bool) -> Dataset:
    from torchvision.transforms.functional import pil_to_tensor

    folder = next((f for f in (root, root / "tiny-imagenet-200") if (f / "train").is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"no tiny-imagenet-200/train or train in {root}; {_how_to_get('tiny-imagenet')}")
    classes = [entry.name for entry in class_folders(folder / "train")]
    _check_count("tiny-imagenet", folder / "train", classes)
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
        raise FileNotFoundError(f"{folder} has no images of the {split} split; {_how_to_get('tiny-imagenet')}")
    return ImageFiles(samples, pil_to_tensor, classes=classes)


def _check_count(name: str, folder: Path, classes: Sequence[str]) -> None:
    """Labels are places in the sorted list of classes, so a class that is not there shifts all that follow."""
    if len(classes) != DATASETS[name].num_classes:
        raise ValueError(
            f"{folder} has {len(classes)} classes, {name} has {DATASETS[name].num_classes}; get the whole data set, or "
            "take its folders as a data set of yours: dataset='folder' (--dataset folder)"
        )


def _class_folders(name: str, root: Path, split: str) -> list[Path]:
    """The folders of the classes, sorted by name as torchvision's ImageFolder does."""
    names = {"train": ["train"], "test": ["val"] if name == "imagenet" else ["val", "test"]}[split]
    found = next((root / part for part in names if (root / part).is_dir()), None)
    flat = found is None and (name, split) == ("folder", "train") and not (root / "val").is_dir() and root.is_dir()
    folder = root if flat else found
    classes = class_folders(folder) if folder is not None else []
    if not classes:
        raise FileNotFoundError(f"no folders of classes in {root / ' or '.join(names)}; {_how_to_get(name)}")
    if flat:
        refuse_splits(root, classes)
    if name == "imagenet":
        _check_count(name, classes[0].parent, [entry.name for entry in classes])
    return classes


def _image_folder(name: str, root: Path, split: str, download: bool, size: int = 224) -> Dataset:
    from torchvision import transforms

    folders = _class_folders(name, root, split)
    classes = [folder.name for folder in folders]
    if split == "test" and (root / "train").is_dir():
        expected = [folder.name for folder in _class_folders(name, root, "train")]
        if different := difference(classes, expected):
            raise ValueError(f"{folders[0].parent} and {root / 'train'} differ in classes: {different}")
    samples = [(path, label) for label, folder in enumerate(folders) for path in sorted(image_paths(folder))]
    crop = transforms.Compose([transforms.RandomResizedCrop(size), transforms.PILToTensor()])
    return ImageFiles(samples, partial(_centre, size=size), crop, classes)


def _centre(image: Any, size: int) -> Tensor:
    """The centre of an RGB image, [3, size, size] uint8: 224/256 of its shorter side, as ImageNet is measured."""
    from torchvision.transforms import functional

    shorter = min(image.size)
    if max(image.size) > 20 * shorter:
        # Only the centre is needed, and the whole at this height or width may not fit into memory.
        image = functional.center_crop(image, [min(length, 20 * shorter) for length in (image.height, image.width)])
    image = functional.resize(image, [resize("folder", size)])
    return functional.pil_to_tensor(functional.center_crop(image, [size]))


class _explained:  # noqa: N801  reads as a word in `with _explained(...)`
    """Turns torchvision's "not found or corrupted" into an error that names the files and says how to get them.

    files: path → MD5 of what was published.
    """

    def __init__(self, name: str, files: Mapping[Path, str]) -> None:
        self.name, self.files = name, files

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            words = [
                f"{path} is {'damaged' if path.is_file() else 'missing'}"
                for path, md5 in self.files.items()
                if not path.is_file() or hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != md5
            ]
            raise FileNotFoundError(f"{', '.join(words) or error}; {_how_to_get(self.name)}") from error


def _how_to_get(name: str) -> str:
    if name == "tiny-imagenet":
        return "get tiny-imagenet-200.zip from Stanford's CS231n course page and unpack it there"
    if name == "imagenet":
        return "ask image-net.org for ILSVRC2012 and sort it into train/<class>/ and val/<class>/"
    if name == "folder":
        return "put images into train/<class>/ and val/<class>/, or into <class>/ alone"
    return "download=True (--download) fetches it there, or name the folder that holds the published files"


# Published label files, by `fingerprint`: MNIST's and Fashion-MNIST's have the same names and shapes.
PUBLISHED_LABELS = {
    "e474323ac02fc156": "mnist",
    "2fd8de6bdb8d1178": "mnist",
    "e3245b63f7c40d1c": "fashion-mnist",
    "d51d859896c55775": "fashion-mnist",
}
_PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
DATASETS = {
    "mnist": DatasetInfo((1, 28, 28), 10, (0.1307,), (0.3081,), _mnist_like("mnist", "MNIST")),
    "fashion-mnist": DatasetInfo((1, 28, 28), 10, (0.2860,), (0.3530,), _mnist_like("fashion-mnist", "FashionMNIST")),
    "svhn": DatasetInfo((3, 32, 32), 10, *_HALF, _svhn),
    "cifar10": DatasetInfo((3, 32, 32), 10, *_CIFAR10, _cifar10, shift=4, flip=True),
    "tiny-imagenet": DatasetInfo((3, 64, 64), 200, *_HALF, _tiny_imagenet, flip=True),
    "imagenet": DatasetInfo((3, 224, 224), 1000, *_PHOTOGRAPHS, partial(_image_folder, "imagenet"), flip=True),
    # The number of classes is counted, see `info`.
    "folder": DatasetInfo((3, 224, 224), 0, *_PHOTOGRAPHS, partial(_image_folder, "folder"), flip=True),
}
