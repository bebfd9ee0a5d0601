"""Answers and labels → accuracy, cost and exits: of the whole, of every class and of every exit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate, random_split

from .. import criteria
from ..model import EarlyExitNet
from ..result import ExitOutput, ExitResult, concatenated
from .calibration import exits_taken


@dataclass(frozen=True)
class Evaluation:
    """What a network's answers are worth.

    mean_cost, mean_path_cost: see `EarlyExitNet.cost` and `path_cost`.
    right, wrong: images per exit, n + 1 numbers each.
    class_accuracy: per class, None where no image has it.
    class_exits: per class, how many images left at each exit.
    """

    images: int
    accuracy: float
    mean_cost: float
    mean_path_cost: float
    right: tuple[int, ...]
    wrong: tuple[int, ...]
    class_accuracy: tuple[float | None, ...]
    class_exits: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ExitQuality:
    """What one exit would be worth if every image took it.

    probability_error, confidence_error: expected calibration error of the largest probability, and of the learned
        confidence, as the probability that this exit is right.
    """

    accuracy: float
    probability_error: float
    confidence_error: float


@dataclass(frozen=True)
class Flips:
    """How many images took another exit than in the reference, and how far from its threshold the furthest one was."""

    count: int
    distance: float


@torch.no_grad()
def answers(
    run: Callable[[Tensor], ExitResult], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[ExitResult, Tensor]:
    """All answers of `run` (a network in eval mode or an accelerated one), and the labels [N], on the CPU.

    batches: (images as `run` takes them, labels [n]); device: where `run` wants them.
    Raises `ValueError` without images.
    """
    results, labels = [], []
    for images, target in batches:
        results.append(ExitResult(*(part.cpu() for part in run(images.to(device)))))
        labels.append(target.cpu())
    if not results:
        raise ValueError("batches is empty; there is nothing to evaluate")
    return concatenated(results), torch.cat(labels)


def evaluate(result: ExitResult, labels: Tensor, net: EarlyExitNet) -> Evaluation:
    """Accuracy, costs and exits of answers to N ≥ 1 images.

    labels: [N] int64; net: what answered, of which only costs and numbers of classes and exits are read.
    Raises `ValueError` for labels that are not 0 … K - 1, one per answer.
    """
    n, classes, exits = len(labels), net.num_classes, net.num_exits + 1
    if n == 0 or len(result.exit_index) != n:
        raise ValueError(f"{len(result.exit_index)} answers and {n} labels; give one label per answer, at least one")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, but the network knows {classes} classes; "
            "is this the data set that it was trained on?"
        )
    right = result.labels == labels
    # [class, exit, wrong or right] → images
    counts = torch.bincount((labels * exits + result.exit_index) * 2 + right, minlength=classes * exits * 2)
    counts = counts.view(classes, exits, 2)
    seen, correct = counts.sum(dim=(1, 2)).tolist(), counts[:, :, 1].sum(dim=1).tolist()
    return Evaluation(
        images=n,
        accuracy=int(right.sum()) / n,
        mean_cost=net.cost.double().cpu()[result.exit_index].mean().item(),
        mean_path_cost=net.path_cost.double().cpu()[result.exit_index].mean().item(),
        right=tuple(counts[:, :, 1].sum(dim=0).tolist()),
        wrong=tuple(counts[:, :, 0].sum(dim=0).tolist()),
        class_accuracy=tuple(c / s if s else None for c, s in zip(correct, seen, strict=True)),
        class_exits=tuple(map(tuple, counts.sum(dim=2).tolist())),
    )


def exit_quality(outputs: Sequence[ExitOutput], labels: Tensor) -> tuple[ExitQuality, ...]:
    """Accuracy and calibration of every exit on all images, from what `thresholds.calibration.collect` returns."""
    found = []
    for out in outputs:
        right = out.logits.argmax(dim=1) == labels
        probability = torch.softmax(out.logits.float(), dim=1).amax(dim=1)
        errors = (expected_calibration_error(value, right) for value in (probability, out.confidence))
        found.append(ExitQuality(right.double().mean().item(), *errors))
    return tuple(found)


def expected_calibration_error(probability: Tensor, right: Tensor, bins: int = 15) -> float:
    """Σ over bins of equal width of (share of samples) · |mean probability - share of right ones| (Naeini et al. 2015).

    probability: [N] in 0 … 1, that the sample is right; NaN counts as 0. right: [N] bool. Bins are closed above, as in
    Guo et al. 2017. 0 without samples.
    """
    p = probability.double().nan_to_num(nan=0.0)
    bin_index = (p * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_index, p - right.double())
    return float(gap.abs().sum()) / max(len(p), 1)


def flips(result: ExitResult, reference: ExitResult, outputs: Sequence[ExitOutput], net: EarlyExitNet) -> Flips:
    """Where two runs of one network parted.

    result, reference: answers to the same N images; outputs: of all exits for these images.
    distance: the largest of `flip_distances`; 0 without flips.
    """
    distances = flip_distances(result.exit_index, reference.exit_index, outputs, net)
    return Flips(len(distances), float(distances.max()) if len(distances) else 0.0)


def flip_distances(taken: Tensor, expected: Tensor, outputs: Sequence[ExitOutput], net: EarlyExitNet) -> Tensor:
    """|confidence - threshold| at the earlier of the two exits, for the images that took another one: [flips] float32.

    taken, expected: [N] int64 exits of the same N images; outputs: of all exits for these images, on the CPU.
    """
    flipped = taken != expected
    if not flipped.any():
        return torch.empty(0)
    parted = torch.minimum(taken, expected)[flipped]
    confidence = torch.stack([net.criterion.confidence(out.logits, out.confidence_logit) for out in outputs[:-1]])
    return (confidence[:, flipped].T - net.thresholds.cpu()).abs().gather(1, parted[:, None]).squeeze(1)


def by_thresholds(
    outputs: Sequence[ExitOutput], net: EarlyExitNet, criterion: str, thresholds: Sequence[float]
) -> ExitResult:
    """The answers that a criterion and thresholds give on cached outputs, without running the network."""
    rule = criteria.get(criterion)
    taken = exits_taken(outputs, rule, thresholds)
    rows = torch.arange(len(taken))
    confidence = torch.stack([rule.confidence(out.logits, out.confidence_logit) for out in outputs])
    logits = torch.stack([out.logits for out in outputs])
    return ExitResult(logits[taken, rows], taken, confidence[taken, rows], net.cost.cpu()[taken])


def split(images: Dataset, count: int, seed: int) -> tuple[Subset, Subset]:
    """The images that `eefast train` with this seed trains on, and the `count` that it keeps aside for thresholds."""
    total = len(images)  # type: ignore[arg-type]
    if not 1 <= count <= total:
        raise ValueError(f"held_out={count} must lie in 1 … {total}, the number of training images")
    rest, kept = random_split(images, [total - count, count], generator=torch.Generator().manual_seed(seed))
    return rest, kept


def default_held_out(total: int) -> int:
    """How many of `total` training images `eefast train` keeps aside unless told: 5,000, at most a fifth."""
    return min(5000, max(1, total // 5))


def held_out(images: Dataset, count: int, seed: int) -> Subset:
    """The `count` training images that `eefast train` with this seed keeps aside to choose thresholds on."""
    return split(images, count, seed)[1]


def batches(images: Dataset, batch_size: int, workers: int = 0) -> DataLoader:
    """(uint8 images [n, C, H, W], labels [n]) in the order of the data set, of `eefast.train.data.dataset`."""
    return ImageLoader(images, batch_size, num_workers=workers, collate_fn=collate)


class ImageLoader(DataLoader):
    """A `DataLoader` that raises a `RuntimeError` of one line where images cannot be read, also by worker processes."""

    def __iter__(self) -> Any:
        # The iterator is made now, as it draws from the generator of random numbers.
        return self._read(super().__iter__())

    @staticmethod
    def _read(found: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from found
        except MemoryError:
            raise
        except Exception as error:
            # A worker's error has its traceback in its text, and what was raised in the last line.
            why = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise RuntimeError(f"images could not be read: {why}") from error


def collate(batch: Any) -> tuple[Tensor, ...]:
    """A batch from samples; data sets in memory give whole batches, which stay as they are."""
    return batch if isinstance(batch, tuple) else tuple(default_collate(batch))


def reported(batches: DataLoader, what: str, progress: Callable[[str, int, int], None]) -> Iterator[Any]:
    """The batches, `progress` told (what, images done, images in all)."""
    done, total = 0, len(batches.dataset)  # type: ignore[arg-type]
    progress(what, 0, total)
    for images, labels in batches:
        yield images, labels
        done += len(labels)
        progress(what, done, total)
