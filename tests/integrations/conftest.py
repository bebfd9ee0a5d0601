"""A network in a folder that takes uint8 images and PNG files."""

from pathlib import Path

import pytest
from networks import lived_in

import eefast


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = (3, 12, 12)
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=shape, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    net.preprocessing, net.classes = eefast.Preprocessing(12), tuple("abcdefghij")
    folder = tmp_path_factory.mktemp("served")
    net.save(folder)
    return folder
