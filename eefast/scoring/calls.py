"""`eefast.predict` and `eefast.score`: what they need is imported when they are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..model import EarlyExitNet

if TYPE_CHECKING:
    from .predictions import Prediction


def predict(
    net: EarlyExitNet | str | Path,
    images: Any,
    *,
    top: int = 1,
    crop_fraction: float | None = None,
    on_error: str = "fail",
    engine: str = "auto",
    device: str | None = None,
    batch_size: int = 64,
) -> list[Prediction]:
    """The answers for image files, or images of Pillow, prepared as the network was trained.

    net: a network with a `preprocessing` and a `normalization`, or the folder of one.
    images: a path, an image of Pillow, or an iterable of them; of a folder all image files in it and below, sorted.
    top: number of most probable classes in each answer.
    crop_fraction: share of an image's shorter side in the centre that is looked at, timm's `crop_pct`; by default as
        the network was trained, and needed where it does not say so.
    on_error: "fail" raises `ValueError`, which names the file, for an image that cannot be read; "record" gives it a
        `Prediction` with an error.
    engine: see `eefast.accelerate`; device: where the network is moved to, by default where it is; batch_size: images
        per call.
    Raises `ValueError` without images and for networks that do not say how images are prepared.
    """
    from . import predictions

    found = net if isinstance(net, EarlyExitNet) else _loaded(net)
    return predictions.predicted(found, images, top, crop_fraction, on_error, engine, device, batch_size)


def _loaded(path: str | Path) -> EarlyExitNet:
    from ..checkpoint.loading import load

    return load(path)
