"""How images are scaled: sides against timm, wrong values."""

import pytest
from timm.data import transforms_factory
from torchvision import transforms

from eefast.preprocessing import Preprocessing, shorter_side


@pytest.mark.parametrize(("size", "shorter"), [(224, 256), (32, 37), (64, 73), (1, 1)])
def test_by_default_the_centre_is_seven_eighths_of_the_shorter_side(size: int, shorter: int) -> None:
    assert shorter_side((3, size, size)) == shorter
    assert shorter_side((1, 2 * size, size)) == shorter


@pytest.mark.parametrize("size", [32, 224, 299])
@pytest.mark.parametrize("fraction", [0.875, 0.9, 0.95, 1.0])
def test_a_crop_fraction_is_timms(size: int, fraction: float) -> None:
    steps = transforms_factory.create_transform((3, size, size), crop_pct=fraction).transforms
    resize = next(step for step in steps if isinstance(step, transforms.Resize))
    assert shorter_side((3, size, size), fraction) == resize.size


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.01, float("nan")])
def test_a_wrong_crop_fraction_is_an_error(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"crop_fraction=.* must be above 0 and at most 1"):
        shorter_side((3, 32, 32), fraction)


def test_wrong_values_are_errors() -> None:
    with pytest.raises(ValueError, match=r"resize=0 must be at least 1"):
        Preprocessing(0)
    with pytest.raises(ValueError, match=r"interpolation='cubic' is unknown; choose bilinear or bicubic"):
        Preprocessing(32, "cubic")
    with pytest.raises(ValueError, match=r"resize=31, less than the network's images have: 32"):
        Preprocessing(31).check((3, 64, 32))
    Preprocessing(32).check((3, 64, 32))
