"""The options' data set → the images to train on, those held out for choosing thresholds, and the test images."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from torch.utils.data import Dataset, Subset

from ..data import datasets
from ..data.image_sets import ImageFiles, resize_of
from ..data.loaders import default_held_out, split
from ..preprocessing import shorter_side
from ..thresholds.calibration import least_images
from .options import TrainOptions


@dataclass(frozen=True)
class RunImages:
    """Data sets of (uint8 image [C, H, W], label) per sample.

    whole: all training images; unchanged: those to train on; augmented: the same, photographs cropped at random.
    test: None unless it was asked for.
    """

    info: datasets.DatasetInfo
    whole: Dataset
    unchanged: Subset
    augmented: Subset
    held_out: Subset
    test: Dataset | None


def open_images(options: TrainOptions) -> RunImages:
    """Nothing is decoded yet. Raises what `datasets.dataset` does, and `ValueError` where too few are left to train on.

    Few held-out images are reported on stderr.
    """
    # Beside published weights it is meant for these, where images cannot be fetched.
    download = options.download and (options.weights is None or options.dataset not in datasets.NOT_FETCHED)

    def opened(split: str, resize: int | None) -> Dataset:
        return datasets.dataset(options.dataset, options.data_root, split, download, options.image_size, resize)

    shape = datasets.info(options.dataset, options.data_root, options.image_size).shape
    whole = opened("train", None if options.crop_fraction is None else shorter_side(shape, options.crop_fraction))
    info = datasets.info(options.dataset, options.data_root, options.image_size)
    count = _held_out(options, len(whole))  # type: ignore[arg-type]
    test = opened("test", resize_of(whole)) if options.test else None
    unchanged, held_out = split(whole, count, options.seed)
    if options.train_images is not None:
        if not options.batch_size <= options.train_images <= len(unchanged):
            raise ValueError(
                f"train_images={options.train_images} must be at least batch_size={options.batch_size} and at most "
                f"{len(unchanged)}, the training images that are not held out"
            )
        unchanged = Subset(whole, unchanged.indices[: options.train_images])
    augmented = whole
    if isinstance(whole, ImageFiles):
        augmented, info = whole.for_training(), replace(info, shift=whole.shift)
    return RunImages(info, whole, unchanged, Subset(augmented, unchanged.indices), held_out, test)


def _held_out(options: TrainOptions, total: int) -> int:
    """Number of the `total` training images that are held out."""
    count = options.held_out
    if count is None:
        count = default_held_out(total)
        if count < 5000:
            print(
                f"{count} of {total:,} training images, a fifth, are held out for choosing thresholds", file=sys.stderr
            )
    least = least_images(options.max_accuracy_drop if options.max_cost is None else None)
    if count < least:
        print(
            f"held_out={count} images are few for choosing thresholds: each is {1 / count:.4f} of their accuracy; "
            f"hold out {least} or more for a finer choice",
            file=sys.stderr,
        )
    if total - count < options.batch_size:
        raise ValueError(
            f"held_out={count} of {total} training images leaves no batch of batch_size={options.batch_size}; "
            "make one of them smaller"
        )
    return count
