"""The centre that is cut out, against torchvision and timm."""

import numpy as np
import pytest
import torch
from pictures import photograph, ramp
from PIL import Image
from torchvision import transforms

from eefast.data.cropping import prepared
from eefast.preprocessing import Preprocessing

MODES = {name: transforms.InterpolationMode[name.upper()] for name in ("bilinear", "bicubic")}


def by_torchvision(picture: Image.Image, resize: int | list[int], size: int | list[int], how: str) -> torch.Tensor:
    steps = [transforms.Resize(resize, MODES[how]), transforms.CenterCrop(size), transforms.PILToTensor()]
    return transforms.Compose(steps)(picture)


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("resize", [32, 37, 51])
@pytest.mark.parametrize(("height", "width"), [(30, 41), (100, 33), (30, 599), (32, 32), (37, 37), (1, 3)])
def test_the_centre_is_torchvisions(height: int, width: int, resize: int, how: str) -> None:
    picture = photograph(height, width)
    assert torch.equal(
        prepared(picture, (3, 32, 32), Preprocessing(resize, how)), by_torchvision(picture, resize, 32, how)
    )


@pytest.mark.parametrize(("height", "width", "scaled"), [(64, 40, [64, 40]), (70, 50, [56, 40]), (31, 11, [112, 40])])
def test_a_network_of_oblong_images(height: int, width: int, scaled: list[int]) -> None:
    """Scaled until it just covers 40 × 40 · 20 / 16."""
    picture = photograph(height, width)
    found = prepared(picture, (3, 16, 32), Preprocessing(20))
    expected = by_torchvision(picture, scaled, [16, 32], "bilinear")
    assert found.shape == (3, 16, 32)
    assert torch.equal(found, expected)


def test_an_image_of_the_size_is_taken_as_it_is() -> None:
    picture = photograph(16, 32)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(prepared(picture, (3, 16, 32), Preprocessing(16)), expected)


def test_grey_networks_get_grey_images() -> None:
    grey = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    image = Image.fromarray(grey).convert("RGB")
    assert torch.equal(prepared(image, (1, 28, 28), Preprocessing(28)), torch.from_numpy(grey)[None])
    colour = prepared(Image.new("RGB", (5, 5), (200, 100, 0)), (1, 3, 3), Preprocessing(3))
    assert colour.unique().tolist() == [round(0.299 * 200 + 0.587 * 100)]


def test_of_a_very_wide_picture_only_the_centre_is_looked_at() -> None:
    """Which is the same but for a fraction of a pixel."""
    picture = Image.fromarray(np.tile(ramp(1, 1001, 255).astype(np.uint8)[:, :, None], (10, 1, 3)))
    found = prepared(picture, (3, 32, 32), Preprocessing(37))
    assert (found.int() - by_torchvision(picture, 37, 32, "bilinear").int()).abs().max() <= 1
