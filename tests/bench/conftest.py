"""A small network with the answers of all its exits, for the tests of bench/."""

import pytest
import torch
from networks import images, lived_in
from subjects import Subject

from eefast import zoo
from eefast.thresholds.outputs import collect

SHAPE = (1, 12, 12)


@pytest.fixture(scope="module")
def subject():
    net, x = lived_in(zoo.eenet("eenet20", 2, input_shape=SHAPE), 5), images(64, SHAPE)
    return Subject(net, x, collect(net, [(x, torch.zeros(len(x)))])[0])
