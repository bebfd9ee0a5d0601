"""What the tests of checkpoints share: one thread, a saved network, and trained networks of the reference."""

import shutil

import pytest
import torch
from networks import images, lived_in
from reference_nets import EENet, trained

from eefast import zoo


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The networks here are too small for two threads, which on a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    lived_in(zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8), normalization=((0.5,), (2.0,))), 3).save(path)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


@pytest.fixture(scope="module")
def eenet20():
    """One trained reference network per version and exit type, as `load` must find it."""
    made = {}

    def make(version, exit_type, shape=(3, 32, 32), placement=(2, 4)):
        key = version, exit_type, shape, placement
        if key not in made:
            x = images(7, shape, seed=4)
            made[key] = trained(EENet(20, placement, exit_type, 7, shape, version=version), x), x
        return made[key]

    return make
