"""A small network whose images take all exits, and images."""

import pytest
from networks import images, lived_in, spread_thresholds

import eefast

SHAPE = (3, 12, 12)


@pytest.fixture(scope="session")
def net():
    made = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    spread_thresholds(made, images(64, SHAPE), 0.4)
    return made


@pytest.fixture
def x():
    return images(37, SHAPE, seed=1)


@pytest.fixture(scope="session")
def folder(net, tmp_path_factory):
    """Its stages, exported; not to be changed."""
    return eefast.export(net, tmp_path_factory.mktemp("exported") / "stages")
