"""Answers and labels → accuracy, cost and exits: over all images, per class and per exit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import EarlyExitNet
from ..result import ExitOutput, ExitResult
from .outputs import check_labels, flip_distances


@dataclass(frozen=True)
class Evaluation:
    """Accuracy, costs and exits of a network's answers.

    mean_cost, mean_path_cost: see `EarlyExitNet.cost` and `path_cost`.
    right, wrong: images per exit, n + 1 numbers each.
    class_accuracy: per class, None where no image has it.
    class_exits: per class, the number of images at each exit.
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
    """Accuracy and calibration of one exit if every image took it.

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


def evaluate(result: ExitResult, labels: Tensor, net: EarlyExitNet) -> Evaluation:
    """Accuracy, costs and exits of answers to N ≥ 1 images.

    labels: [N] int64; net: the network that answered; only its costs and numbers of classes and exits are read.
    Raises `ValueError` for labels that are not 0 … K - 1, one per answer.
    """
    n, classes, exits = len(labels), net.num_classes, net.num_exits + 1
    if n == 0 or len(result.exit_index) != n:
        raise ValueError(f"{len(result.exit_index)} answers and {n} labels; give one label per answer, at least one")
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, but the network has {classes} classes; "
            "is this the data set that it was trained on?"
        )
    check_labels(labels, n)
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
    """Accuracy and calibration of every exit on all images, from what `outputs.collect` returns."""
    check_labels(labels, len(outputs[0].logits))
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


def count_flips(result: ExitResult, reference: ExitResult, outputs: Sequence[ExitOutput], net: EarlyExitNet) -> Flips:
    """The number of images at which two runs of one network took different exits, and their distance.

    result, reference: answers to the same N images; outputs: of all exits for these images.
    distance: the largest of `flip_distances`; 0 without flips.
    """
    distances = flip_distances(result.exit_index, reference.exit_index, outputs, net)
    return Flips(len(distances), float(distances.max()) if len(distances) else 0.0)
