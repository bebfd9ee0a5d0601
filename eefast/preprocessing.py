"""How image files become a network's pixels: the value of `EarlyExitNet.preprocessing`, saved with the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """An image is scaled and its centre is cut out, H × W pixels as in the network's `input_shape`.

    The pixels are then normalised by the network's `normalization`.

    resize: pixels of the shorter side of the scaled image, where H = W; otherwise the scaled image just covers
        H × W times resize ÷ min(H, W). An image that has this size already is not scaled.
    interpolation: "bilinear" or "bicubic", both with antialiasing, as Pillow computes them.
    """

    resize: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.resize < 1:
            raise ValueError(f"resize={self.resize} must be at least 1")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation!r} is unknown; choose {' or '.join(INTERPOLATIONS)}")

    def check(self, input_shape: Sequence[int]) -> None:
        """`ValueError` where scaled images would be smaller than the (C, H, W) that the network takes."""
        if self.resize < (least := min(input_shape[1:])):
            raise ValueError(f"preprocessing says resize={self.resize}, less than the network's images have: {least}")


def shorter_side(input_shape: Sequence[int], crop_fraction: float | None = None) -> int:
    """Pixels of the shorter side of a photograph, of which the centre is cut out.

    input_shape: (C, H, W) of the centre.
    crop_fraction: share of that side in the centre, timm's `crop_pct`; by default 224/256, as ImageNet is measured.
    Raises `ValueError` unless it is above 0 and at most 1.
    """
    size = min(input_shape[1:])
    if crop_fraction is None:
        return round(size * 256 / 224)
    if not 0 < crop_fraction <= 1:
        raise ValueError(f"crop_fraction={crop_fraction} must be above 0 and at most 1: 1 keeps the shorter side whole")
    return floor(size / crop_fraction)
