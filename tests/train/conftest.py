"""Small data sets in their published layout, and one thread for every training run."""

import gzip
from pathlib import Path

import numpy as np
import pytest
from idx_files import idx_bytes
from one_thread import one_thread as one_thread

from eefast.data.mnist import mnist_test


@pytest.fixture(scope="session")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 real images to train on and 300 to test on, cut from the shipped test set, in the published layout."""
    root = tmp_path_factory.mktemp("data")
    images, labels = mnist_test()
    for stem, part in (("train", slice(0, 900)), ("t10k", slice(2000, 2300))):
        for kind, values in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part])):
            (root / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values.numpy()), 1))
    return root


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three colours in the layout of torchvision's ImageFolder."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 200, (20, 25, 3), dtype=np.uint8)
                pixels[:, :, 2 - label] += 50
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
