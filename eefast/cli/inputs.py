"""What the options of a command name: its network, images, criteria and budget, each checked before work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.record import RECORD_FILE, TrainingRecord
from ..data.image_files import difference
from ..model import WEIGHTS_FILE
from ..system import files
from .output import note

if TYPE_CHECKING:
    from torch import Tensor

    from ..model import EarlyExitNet
    from ..result import ExitOutput
    from ..thresholds.calibration import Calibration

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A data set by its name, the folder that it lies in, whether it may be fetched, and who decodes it.

    record: what the network was trained on, None where that is not known, or not to be minded.
    """

    network: Path
    dataset: str
    data_root: Path | None
    download: bool
    workers: int
    record: TrainingRecord | None
    other_data: bool


def check_folders(*paths: str | Path | None) -> None:
    """`ValueError` unless the files could be written; "-" is stdout."""
    for path in paths:
        if path and path != "-":
            files.check(path)


def check_saving(network: Path, save: bool) -> None:
    if save and not network.is_dir():
        raise ValueError(f"{network} is a file; eefast.load(…).save(folder) makes the folder that --save can write to")
    if save:
        files.check(network / WEIGHTS_FILE)


def opened(
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

    from ..checkpoint.loading import load
    from ..data import datasets

    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; take cpu")
    if dataset is not None:
        datasets.check_name(dataset)
    if path.is_file():
        if dataset is None:
            raise ValueError(f"{path} does not say what it was trained on; name the data set with --dataset")
        found = datasets.info(dataset, data_root or "data")
        net = load(path, input_shape=found.shape, normalization=(found.mean, found.std))
    else:
        net = load(path)
    record = net.record
    if dataset is None:
        dataset = record.dataset if record is not None else _by_normalization(path, net)
    if record is not None and record.dataset != dataset:
        if not other_data:
            raise ValueError(
                f"{path} was trained on {record.dataset}, and --dataset {dataset} is another data set; leave it out, "
                "or add --other-data to take it all the same"
            )
        record = None
    source = Source(path, dataset, data_root, download, workers, None if other_data else record, other_data)
    if record is None:
        known = datasets.info(dataset, data_root or "data")
        if net.num_classes != known.num_classes or net.input_shape[0] != known.shape[0]:
            raise ValueError(
                f"{path} takes images of {net.input_shape[0]} channels and knows {net.num_classes} classes, but "
                f"{dataset} has {known.shape[0]} and {known.num_classes}; name its own data set with --dataset"
            )
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return net.to(torch.device(chosen)), source


def _by_normalization(path: Path, net: EarlyExitNet) -> str:
    """The one data set whose images a network without a record was made for, told by the normalisation."""
    from ..data import datasets

    own = net.normalization and tuple(tuple(map(float, part)) for part in net.normalization)
    fitting = [
        name
        for name, info in datasets.DATASETS.items()
        if (info.mean, info.std) == own and info.num_classes == net.num_classes and info.shape == net.input_shape
    ]
    if len(fitting) != 1:
        raise ValueError(
            f"{path} has no {RECORD_FILE}, so does not say what it was trained on; name the data set with --dataset"
        )
    note(f"{path} has no {RECORD_FILE}; its normalisation is that of {fitting[0]}, which is taken (--dataset)")
    return fitting[0]


def images(net: EarlyExitNet, source: Source, split: str, count: int | None = None) -> Any:
    """A data set with a length: the first `count` images with their labels, or all of them.

    Raises `ValueError` where its classes are not those that the network was trained on.
    """
    from torch.utils.data import Subset

    from ..data import datasets

    if source.data_root is None and (source.dataset, split) == ("mnist", "test"):
        found: Any = datasets.ImageTensors(*datasets.mnist_test())
    else:
        # Photographs come in all sizes; they are brought to the one that the network's costs were counted for.
        size = net.input_shape[1] if source.dataset in ("imagenet", "folder") else None
        root = source.data_root or "data"
        found = datasets.dataset(source.dataset, root, split, source.download, image_size=size)
    own, trained = datasets.class_names(found), source.record.classes if source.record is not None else None
    if own is not None and trained is not None and own != trained:
        raise ValueError(
            f"the classes in {source.data_root or 'data'} are not those that {source.network} was trained on; they "
            f"differ in {difference(own, trained) or 'their order'}; name the folder of the same classes, or add "
            "--other-data if they mean the same"
        )
    return found if count is None or count >= len(found) else Subset(found, range(count))


def least_images(kind: str = "", value: float = 0.0) -> int:
    """How many held-out images a budget asks for."""
    from ..thresholds import calibration

    return calibration.least_images(value if kind == "max_accuracy_drop" else None)


class Kept:
    """The training images that were kept aside, as training drew them or as the options say.

    count, seed: the options; None takes what training had, or what `eefast train` takes unless told.
    least: so many there must be, see `least_images`; None for any number.
    Raises `ValueError` where images that the network was trained on would be among them.
    """

    def __init__(self, source: Source, count: int | None, seed: int | None, least: int | None) -> None:
        record = source.record
        if record is not None:
            for option, given, trained in (("--seed", seed, record.seed), ("--held-out", count, record.held_out)):
                # The last of the images that were kept aside are those of a smaller number.
                if given is not None and (given > trained if option == "--held-out" else given != trained):
                    raise ValueError(
                        f"{option} {given}: {source.network} was trained with {trained}, so images that it was trained "
                        f"on would be among the held-out ones; leave {option} out, or add --other-data to take them"
                    )
        self.source, self.least = source, least
        self.count = count if count is not None or record is None else record.held_out
        self.seed = seed if seed is not None else record.seed if record is not None else 1

    def outputs(
        self, net: EarlyExitNet, cache: Path | None, batch_size: int, progress: Progress
    ) -> tuple[list[ExitOutput], Tensor]:
        """All exits' outputs on these images, from the cache if it has them, and the labels."""
        from ..data import loading
        from ..thresholds import outputs as cached

        count = self.count
        if cache is None or not cache.exists() or count is None:
            whole = images(net, self.source, "train")
            self._check_unchanged(whole)
            if count is None:
                count = loading.default_held_out(len(whole))
                why = "--other-data" if self.source.other_data else f"{self.source.network} has no {RECORD_FILE}"
                note(
                    f"{why}: the held-out images are the {count:,} that eefast train keeps aside with seed {self.seed} "
                    "unless told; --held-out and --seed name others"
                )
        made_of = {
            "network": cached.fingerprint(net),
            "images": f"{count} of {self.source.dataset} by seed {self.seed}",
        }
        if cache is not None and cache.exists():
            self._check_enough(count)
            return cached.load_outputs(cache, made_of)
        kept = loading.split(whole, count, self.seed)[1]
        self._check_enough(count)
        batches = loading.batches(kept, batch_size, self.source.workers)
        found = cached.collect(net, batches.reported("held-out images", progress))
        if cache is not None:
            cached.save_outputs(cache, *found, made_of)
        return found

    def _check_unchanged(self, whole: Any) -> None:
        from ..data import datasets

        record = self.source.record
        if record is not None and (len(whole), datasets.fingerprint(whole)) != (record.images, record.fingerprint):
            raise ValueError(
                f"the {len(whole):,} training images of {self.source.dataset} in {self.source.data_root or 'data'} are "
                f"not the {record.images:,} that {self.source.network} was trained on, so it cannot be told which were "
                "kept aside; name the folder that they lie in, or add --other-data to take these"
            )

    def _check_enough(self, count: int) -> None:
        if self.least is not None and count < self.least:
            record = self.source.record
            no_more = record is not None and count == record.held_out
            way_out = "train with more kept aside" if no_more else "take more with --held-out"
            raise ValueError(
                f"{count} held-out images are too few: one of them is {1 / count:.4f} of the accuracy, so {self.least} "
                f"are needed for this budget; {way_out}, or add --few-images to choose on these"
            )


def criteria(name: str, net: EarlyExitNet) -> list[str]:
    """Their names: all, the one that is named, or the network's own."""
    from .. import criteria as known

    return list(known.CRITERIA) if name == "all" else [known.get(name or net.criterion.name).name]


def budget(**bounds: float | None) -> tuple[str, float]:
    """The one budget that was given, or the default."""
    given = {name: value for name, value in bounds.items() if value is not None} or {"max_accuracy_drop": 0.005}
    if len(given) > 1:
        raise ValueError(f"{', '.join(f'{k}={v}' for k, v in given.items())}: give one of them")
    ((name, value),) = given.items()
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value} must lie in 0 … 1")
    return name, value


def thresholds(
    net: EarlyExitNet,
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    names: Sequence[str],
    kind: str,
    value: float,
    progress: Progress,
) -> tuple[dict[str, Calibration], Mapping[str, str]]:
    """The best thresholds of every criterion within the budget, and why others have none; at least one has."""
    from ..thresholds import calibration, evaluation

    final = evaluation.exit_quality(outputs[-1:], labels)[0].accuracy
    bound = {kind: value} if kind != "max_accuracy_drop" else {"min_accuracy": final - value}
    chosen, impossible = {}, {}
    for i, name in enumerate(names):
        progress("choosing thresholds", i, len(names))
        try:
            chosen[name] = calibration.calibrate(outputs, labels, net.cost, name, **bound)
        except ValueError as error:
            impossible[name] = str(error)
    progress("choosing thresholds", len(names), len(names))
    if not chosen:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return chosen, impossible
