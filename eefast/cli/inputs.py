"""What the options of a command name: its network, images, criteria and budget, each checked before work starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..model import WEIGHTS_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibrate import Calibration
    from ..model import EarlyExitNet
    from ..result import ExitOutput

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A data set by its name, the folder that it lies in, whether it may be fetched, and who decodes it."""

    dataset: str
    data_root: Path | None
    download: bool
    workers: int


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


def network(path: Path, source: Source, device: str) -> EarlyExitNet:
    """The network on its device; one of the reference gets the data set's shape and normalisation, which it lacks."""
    import torch

    from ..checkpoint import load
    from ..train import data

    if device not in ("auto", "cpu") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: PyTorch finds no CUDA device here; take cpu")
    found = data.info(source.dataset, source.data_root or "data")
    lacking: dict[str, Any] = {"input_shape": found.shape, "normalization": (found.mean, found.std)}
    net = load(path, **(lacking if path.is_file() else {}))
    if net.num_classes != found.num_classes or net.input_shape[0] != found.shape[0]:
        raise ValueError(
            f"{path} takes images of {net.input_shape[0]} channels and knows {net.num_classes} classes, but "
            f"{source.dataset} has {found.shape[0]} and {found.num_classes}; name its own data set with --dataset"
        )
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return net.to(torch.device(chosen))


def images(net: EarlyExitNet, source: Source, split: str, count: int | None = None) -> Any:
    """A data set with a length: the first `count` images with their labels, or all of them."""
    from torch.utils.data import Subset

    from ..train import data

    if source.data_root is None and (source.dataset, split) == ("mnist", "test"):
        found: Any = data.ImageTensors(*data.mnist_test())
    else:
        # Photographs come in all sizes; they are brought to the one that the network's costs were counted for.
        size = net.input_shape[1] if source.dataset in ("imagenet", "folder") else None
        root = source.data_root or "data"
        found = data.dataset(source.dataset, root, split, source.download, image_size=size)
    return found if count is None or count >= len(found) else Subset(found, range(count))


def held_out(
    net: EarlyExitNet,
    source: Source,
    count: int,
    seed: int,
    cache: Path | None,
    batch_size: int,
    progress: Progress,
) -> tuple[list[ExitOutput], Tensor]:
    """All exits' outputs on the held-out training images, from the cache if it has them, and the labels."""
    from .. import calibrate, evaluate

    made_of = {"network": calibrate.fingerprint(net), "images": f"{count} of {source.dataset} by seed {seed}"}
    if cache is not None and cache.exists():
        return calibrate.load_outputs(cache, made_of)
    kept = evaluate.held_out(images(net, source, "train"), count, seed)
    batches = evaluate.batches(kept, batch_size, source.workers)
    found = calibrate.collect(net, evaluate.reported(batches, "held-out images", progress))
    if cache is not None:
        calibrate.save_outputs(cache, *found, made_of)
    return found


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
    from .. import calibrate, evaluate

    final = evaluate.exit_quality(outputs[-1:], labels)[0].accuracy
    bound = {kind: value} if kind != "max_accuracy_drop" else {"min_accuracy": final - value}
    chosen, impossible = {}, {}
    for i, name in enumerate(names):
        progress("choosing thresholds", i, len(names))
        try:
            chosen[name] = calibrate.calibrate(outputs, labels, net.cost, name, **bound)
        except ValueError as error:
            impossible[name] = str(error)
    progress("choosing thresholds", len(names), len(names))
    if not chosen:
        raise ValueError("; ".join(f"{name}: {why}" for name, why in impossible.items()))
    return chosen, impossible
