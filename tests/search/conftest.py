"""A few images in MNIST's layout and a network that was trained on them, as its record says."""

from pathlib import Path

import pytest
from idx_files import idx_bytes
from networks import lived_in
from one_thread import one_thread as one_thread

from eefast import zoo
from eefast.data import datasets
from eefast.data.mnist import mnist_test


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 160 training images, 70 of them held out, 40 test images, and the network in "net"."""
    folder = tmp_path_factory.mktemp("searched")
    images, labels = mnist_test()
    for stem, part in (("train", slice(0, 160)), ("t10k", slice(200, 240))):
        for kind, values in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part])):
            (folder / f"{stem}-{kind}-ubyte").write_bytes(idx_bytes(values.numpy().astype("uint8")))
    info = datasets.info("mnist")
    net = lived_in(zoo.eenet("eenet20", 1, input_shape=info.shape, normalization=(info.mean, info.std)), 1)
    whole = datasets.dataset("mnist", folder, "train")
    net.record = datasets.record("eenet20", 10, info.shape, "mnist", whole, 70, 3)
    net.save(folder / "net")
    return folder
