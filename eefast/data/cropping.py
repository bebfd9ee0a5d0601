"""An image of any size → the pixels that a network takes: scaled, its centre cut out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..preprocessing import Preprocessing


def prepared(image: Any, shape: Sequence[int], how: Preprocessing) -> Tensor:
    """As `pixels`, a tensor."""
    return torch.from_numpy(pixels(image, shape, how).copy(order="K"))


def pixels(image: Any, shape: Sequence[int], how: Preprocessing) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The centre of an RGB image of Pillow, [C, H, W] uint8, as torchvision's Resize and CenterCrop cut it out.

    shape: (C, H, W), C of 1 (grey) or 3; how: scales the image, see `Preprocessing`. Not to be written to.
    """
    from PIL import Image

    channels, height, width = shape
    shorter = min(image.size)
    if max(image.size) > 20 * shorter * max(height, width) // min(height, width):
        # Only the centre is needed, and the whole at this height or width may not fit into memory.
        image = _centre(image, *(min(length, 20 * shorter) for length in (image.height, image.width)))
    size = _covering(image.width, image.height, *(side * how.resize // min(height, width) for side in (width, height)))
    if size != image.size:
        image = image.resize(size, Image.Resampling[how.interpolation.upper()])
    image = _centre(image, height, width)
    if channels == 1:
        return np.asarray(image.convert("L"))[None]
    return np.asarray(image).transpose(2, 0, 1)


def _covering(width: int, height: int, least_width: int, least_height: int) -> tuple[int, int]:
    """The size in these proportions that just covers the least one."""
    if least_width * height >= least_height * width:
        return least_width, int(least_width * height / width)
    return int(least_height * width / height), least_height


def _centre(image: Any, height: int, width: int) -> Any:
    if image.size == (width, height):
        return image
    left, top = (round((there - wanted) / 2.0) for there, wanted in zip(image.size, (width, height), strict=True))
    return image.crop((left, top, left + width, top + height))
