"""A few images and a network → an answer for each, with names of classes: prepared, batched, run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..api import accelerate
from ..data.cropping import prepared
from ..data.decoding import decode, decode_image
from ..data.image_files import ImageFileError, image_paths
from ..model import EarlyExitNet
from ..modules.contexts import mode
from .arrays import Arrays
from .preparation import preprocessing_of

ON_ERROR = ("fail", "record")


@dataclass(frozen=True)
class Candidate:
    """A class, and its probability by the softmax of the logits; name: None where the network's classes have none."""

    label: int
    name: str | None
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    image: its path; of a row in a .npy file the path, a colon and the row's number; the number of an image of Pillow.
    top: the most probable classes, the first one is the answer.
    exit, cost, confidence: as in `eefast.ExitResult`.
    error: why the image could not be read; then `top` is empty and the figures are None.
    """

    image: str
    top: tuple[Candidate, ...] = ()
    exit: int | None = None
    cost: float | None = None
    confidence: float | None = None
    error: str | None = None

    @property
    def label(self) -> int | None:
        return self.top[0].label if self.top else None

    @property
    def name(self) -> str | None:
        return self.top[0].name if self.top else None

    @property
    def probability(self) -> float | None:
        return self.top[0].probability if self.top else None


def predicted(
    net: EarlyExitNet,
    images: Any,
    top: int,
    crop_fraction: float | None,
    on_error: str,
    engine: str,
    device: str | None,
    batch_size: int,
    stages: str,
) -> list[Prediction]:
    """See `eefast.predict`."""
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r} is unknown; choose {' or '.join(ON_ERROR)}")
    named = list(_named(images, net.input_shape))
    if not named:
        raise ValueError("there are no images to answer; give image files, or folders with some")
    pixels, found = None, list[Prediction]()
    if crop_fraction is not None or not all(isinstance(image, np.ndarray) for _, image in named):
        pixels = partial(prepared, shape=net.input_shape, how=preprocessing_of(net, crop_fraction))
    with mode(net, training=False):
        fast = accelerate(net if device is None else net.to(device), engine=engine, stages=stages)
        for _, alike in groupby(named, lambda pair: _kind(pair[1])):
            while batch := list(islice(alike, batch_size)):
                found += _answers(fast, net, [_read(image, name, pixels, on_error) for name, image in batch], top)
    return found


def _kind(image: Any) -> Any:
    """Images of one kind can be in one batch."""
    return (image.shape, image.dtype) if isinstance(image, np.ndarray) else None


def _named(images: Any, shape: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """(name, path, image of Pillow, or what the network takes) of everything that was given; shape: see `Arrays`."""
    alone = isinstance(images, (str, Path)) or not isinstance(images, Iterable)
    for i, image in enumerate([images] if alone else images):
        if not isinstance(image, (str, Path)):
            if not hasattr(image, "convert"):
                raise TypeError(f"images[{i}] is a {type(image).__name__}; give paths, or images of Pillow")
            yield str(i), image
        elif Path(image).is_dir():
            yield from ((str(path), path) for path in sorted(image_paths(Path(image))))
        elif Path(image).suffix.lower() == ".npy" and Path(image).is_file():
            yield from ((f"{image}:{row}", values) for row, values in enumerate(Arrays([Path(image)], shape).all()))
        elif Path(image).exists():
            yield str(image), Path(image)
        else:
            raise FileNotFoundError(f"{image} does not exist; give image files, folders with some, or .npy files")


def _read(image: Any, name: str, pixels: Any, on_error: str) -> tuple[str, Tensor | str]:
    """The image's name, and its pixels or why it has none."""
    if isinstance(image, np.ndarray):
        return name, torch.from_numpy(image)
    try:
        return name, pixels(decode(image) if isinstance(image, Path) else decode_image(image, name))
    except ImageFileError as error:
        if on_error == "fail":
            raise
        return name, str(error)


def _answers(fast: Any, net: EarlyExitNet, images: list[tuple[str, Tensor | str]], top: int) -> Iterator[Prediction]:
    whole = [image for _, image in images if isinstance(image, Tensor)]
    results: Iterator[Any] = iter(())
    if whole:
        stacked = torch.stack(whole)
        kind = next(net.parameters()).dtype if stacked.is_floating_point() else None
        answer = fast(stacked.to(net.thresholds.device, kind))
        best = answer.probs.topk(min(top, net.num_classes))
        parts = (best.values, best.indices, answer.exit_index, answer.cost, answer.confidence)
        results = zip(*(part.tolist() for part in parts), strict=True)
    for name, image in images:
        if not isinstance(image, Tensor):
            yield Prediction(name, error=image)
            continue
        values, labels, exit_index, cost, confidence = next(results)
        classes = net.classes
        candidates = tuple(
            Candidate(label, classes[label] if classes is not None else None, value)
            for label, value in zip(labels, values, strict=True)
        )
        yield Prediction(name, candidates, exit_index, cost, confidence)
