"""A network → how image files are prepared for it, or an error that says how to tell."""

from __future__ import annotations

from ..model import EarlyExitNet
from ..preprocessing import Preprocessing, shorter_side


def preprocessing_of(net: EarlyExitNet, crop_fraction: float | None = None) -> Preprocessing:
    """How `net` wants image files to be prepared; crop_fraction: instead of that in the network.

    Raises `ValueError` where it takes no image files: windows, not 1 or 3 channels, no normalization, no preprocessing.
    """
    channels, known = net.input_shape[0], net.preprocessing
    if len(net.input_shape) == 2:
        raise ValueError(f"the network takes windows [N, {channels}, L], no image files; give .npy files of windows")
    if channels not in (1, 3):
        raise ValueError(f"the network takes images of {channels} channels, image files have 1 or 3; give .npy files")
    if net.normalization is None:
        raise ValueError(
            "the network does not say how pixels are normalised; set net.normalization = (mean, std), one number per "
            "channel on the scale 0 … 1, and net.save(folder)"
        )
    if crop_fraction is not None:
        how = "bilinear" if known is None else known.interpolation
        return Preprocessing(shorter_side(net.input_shape, crop_fraction), how)
    if known is None:
        raise ValueError(
            "the network does not say how images are scaled and cropped; give crop_fraction (--crop-fraction): 1 for "
            "images taken whole, 0.875 as ImageNet is measured; or set net.preprocessing = eefast.Preprocessing(resize)"
            " and net.save(folder)"
        )
    known.check(net.input_shape)
    return known
