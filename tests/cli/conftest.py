"""What the tests of commands share: images and a network in a folder."""

import pytest
import torch
from idx_files import idx_bytes
from networks import lived_in, spread_thresholds

from eefast import zoo


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A folder with MNIST's files, of noise, and one with a network that uses all its exits."""
    folder = tmp_path_factory.mktemp("shop")
    random = torch.Generator().manual_seed(0)
    images = {}
    for stem, n in (("train", 70), ("t10k", 41)):
        images[stem] = torch.randint(256, (n, 28, 28), generator=random, dtype=torch.uint8)
        labels = torch.randint(9, (n,), generator=random, dtype=torch.uint8)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images[stem].numpy()))
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels.numpy()))
    net = lived_in(zoo.eenet("eenet8", input_shape=(1, 28, 28), normalization=((0.1307,), (0.3081,))), 1)
    spread_thresholds(net, net.prepare(images["t10k"].unsqueeze(1)), 0.4)
    net.save(folder / "net")
    return folder
