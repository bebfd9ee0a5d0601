"""The options network and dataset → the network on its device and the images, checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import RECORD_FILE, WEIGHTS_FILE
from ..data.image_files import difference
from ..system import files
from .output import note

if TYPE_CHECKING:
    from ..model import EarlyExitNet
    from ..record import TrainingRecord


@dataclass(frozen=True)
class Source:
    """A data set by its name, the folder of its files, whether it may be fetched, and how many processes decode it.

    record: what the network was trained on; None where that is not known, or is to be ignored (`other_data`).
    """

    network: Path
    dataset: str
    data_root: Path | None
    download: bool
    workers: int
    record: TrainingRecord | None
    other_data: bool


def check_saving(network: Path, save: bool) -> None:
    """`ValueError` where `save` is asked for and the network is no folder, or cannot be written."""
    if save and not network.is_dir():
        raise ValueError(f"{network} is a file; eefast.load(…).save(folder) makes the folder that --save can write to")
    if save:
        files.check(network / WEIGHTS_FILE)


def open_network(
    path: Path,
    dataset: str | None,
    data_root: Path | None,
    download: bool,
    workers: int,
    device: str,
    other_data: bool,
) -> tuple[EarlyExitNet, Source]:
    """The network on its device, and the data set: the one that it was trained on, or the one that is named.

    A network of the reference gets the data set's shape and normalisation, which it lacks. Raises `ValueError` where it
    is not known what the network was trained on and nothing is named, and where something else is named without
    other_data.
    """
    import torch

    from ..data import datasets

    device = chosen_device(device)
    if dataset is not None:
        datasets.check_name(dataset)
    net = _load(path, dataset, data_root)
    record = net.record
    if dataset is None:
        dataset = record.dataset if record is not None else _dataset_by_normalization(path, net)
    if record is not None and record.dataset != dataset:
        if not other_data:
            raise ValueError(
                f"{path} was trained on {record.dataset}, and --dataset {dataset} is another data set; leave it out, "
                "or add --other-data to use it all the same"
            )
        record = None
    if record is None:
        _check_fit(path, net, dataset, data_root)
    source = Source(path, dataset, data_root, download, workers, None if other_data else record, other_data)
    return net.to(torch.device(device)), source


def chosen_device(device: str) -> str:
    """The device that an option names, of "auto" CUDA where there is some; `ValueError` without what it names."""
    import torch

    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; take cpu")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _load(path: Path, dataset: str | None, data_root: Path | None) -> EarlyExitNet:
    from ..checkpoint.loading import load
    from ..data import datasets

    if not path.is_file():
        return load(path)
    if dataset is None:
        raise ValueError(f"{path} does not say what it was trained on; name the data set with --dataset")
    known = datasets.info(dataset, data_root or "data")
    return load(path, input_shape=known.shape, normalization=(known.mean, known.std))


def _check_fit(path: Path, net: EarlyExitNet, dataset: str, data_root: Path | None) -> None:
    from ..data import datasets

    known = datasets.info(dataset, data_root or "data")
    if net.num_classes != known.num_classes or net.input_shape[0] != known.shape[0]:
        raise ValueError(
            f"{path} takes images of {net.input_shape[0]} channels and has {net.num_classes} classes, but {dataset} "
            f"has {known.shape[0]} channels and {known.num_classes} classes; name with --dataset what it was trained on"
        )


def _dataset_by_normalization(path: Path, net: EarlyExitNet) -> str:
    """The one data set whose shape, classes and normalisation a network without a record has."""
    from ..data import datasets

    normalization = net.normalization and tuple(tuple(map(float, part)) for part in net.normalization)
    fitting = [
        name
        for name, info in datasets.DATASETS.items()
        if (info.mean, info.std) == normalization
        and info.num_classes == net.num_classes
        and info.shape == net.input_shape
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{path} has no {RECORD_FILE}, so does not say what it was trained on; name the data set with --dataset"
        )
    note(f"{path} has no {RECORD_FILE}; its normalisation is that of {fitting[0]}, which is used (--dataset)")
    return fitting[0]


def load_images(net: EarlyExitNet, source: Source, split: str, count: int | None = None) -> Any:
    """A data set with a length: the first `count` images with their labels, or all of them.

    Raises `ValueError` where its classes are not those that the network was trained on.
    """
    from torch.utils.data import Subset

    from ..data import datasets, image_sets, mnist

    if source.data_root is None and (source.dataset, split) == ("mnist", "test"):
        found: Any = image_sets.ImageTensors(*mnist.mnist_test())
    else:
        # Photographs come in all sizes; they are resized to the one that the network's costs were counted for.
        size = net.input_shape[1] if source.dataset in ("imagenet", "folder") else None
        root = source.data_root or "data"
        resize = source.record.resize if source.record is not None else None
        found = datasets.dataset(source.dataset, root, split, source.download, size, resize)
    classes, trained = image_sets.class_names(found), source.record.classes if source.record is not None else None
    if classes is not None and trained is not None and classes != trained:
        raise ValueError(
            f"the classes in {source.data_root or 'data'} are not those that {source.network} was trained on; they "
            f"differ in {difference(classes, trained) or 'their order'}; name the folder of the same classes, or add "
            "--other-data if they mean the same"
        )
    return found if count is None or count >= len(found) else Subset(found, range(count))
