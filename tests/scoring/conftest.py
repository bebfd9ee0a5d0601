"""A network that uses all its exits, and images of all kinds in files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lived_in, spread_thresholds
from PIL import Image

import eefast
from eefast import zoo
from eefast.data.cropping import prepared

SHAPE = (3, 17, 17)


def picture(number: int) -> Image.Image:
    """Noise of other contrast and colour in each."""
    random = np.random.default_rng(number)
    pixels = (
        128 + random.normal(0, 60, 3) + random.normal(0, 1 + 3 * (number % 20), (17 + number % 4, 30 - number % 23, 3))
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network that knows how images are prepared, and its classes."""
    folder = tmp_path_factory.mktemp("scoring") / "net"
    net = zoo.eenet("eenet8", num_classes=5, input_shape=SHAPE, normalization=((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)))
    lived_in(net, 3)
    net.preprocessing = eefast.Preprocessing(20)
    pixels = torch.stack([prepared(picture(i), SHAPE, net.preprocessing) for i in range(60)])
    spread_thresholds(net, net.prepare(pixels), 0.4)
    net.classes = ("ant", "bee", "cat", "dog", "Ente")
    net.save(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 image files of several sizes in a folder and folders below it."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(23):
        path = folder / ("", "b", "a/ö ü")[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path, quality=95)
    return folder
