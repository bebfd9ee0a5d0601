"""What a network says of image files, or how to tell it."""

import pytest

from eefast import Preprocessing, zoo
from eefast.scoring.preparation import preprocessing_of


def test_the_networks_own_unless_a_fraction_is_given() -> None:
    net = zoo.eenet("eenet8", normalization=((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match=r"how images are scaled and cropped; give crop_fraction \(--crop-fraction\)"):
        preprocessing_of(net)
    assert preprocessing_of(net, 0.875) == Preprocessing(36)
    net.preprocessing = Preprocessing(40, "bicubic")
    assert preprocessing_of(net) == net.preprocessing
    assert preprocessing_of(net, 1.0) == Preprocessing(32, "bicubic")


def test_networks_that_take_no_image_files() -> None:
    with pytest.raises(ValueError, match=r"set net.normalization = \(mean, std\)"):
        preprocessing_of(zoo.eenet("eenet8"), 1.0)
    with pytest.raises(ValueError, match=r"takes images of 5 channels, image files have 1 or 3; give \.npy files"):
        preprocessing_of(zoo.eenet("eenet8", input_shape=(5, 32, 32)), 1.0)
    with pytest.raises(ValueError, match=r"takes windows \[N, 1, L\], no image files; give \.npy files"):
        preprocessing_of(zoo.eenet("eenet20-1d", 1, input_shape=(1, 32)), 1.0)
