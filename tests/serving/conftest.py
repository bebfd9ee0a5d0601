"""Servers that end with their test, of a small network and images, and a network whose stages wait for a test."""

import threading

import pytest
import torch
from networks import Stage, images, lived_in, spread_thresholds
from torch import nn

import eefast
from eefast.serving import Server

SHAPE = (3, 12, 12)


@pytest.fixture(scope="session")
def small():
    """(network with three early exits, 31 images of which some exit at each)."""
    net, x = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=SHAPE, num_classes=5), 3), images(31, SHAPE)
    spread_thresholds(net, x, 0.4)
    return net, x


@pytest.fixture
def resident(small):
    """(resident engine, thresholds, images)."""
    net, x = small
    fast = eefast.accelerate(net, engine="resident")
    return fast.engine, fast.ready()[1], x


@pytest.fixture
def serve():
    """Makes servers."""
    made = []

    def make(fast, **options):
        made.append(Server(fast, **options))
        return made[-1]

    yield make
    for server in made:
        server.close(0)


class Gated:
    """A network of three stages on images [1, 2, 2] of one value: those above 0 exit at the first exit, those above -1
    at the second.

    Stage i waits until `gates[i]` is open. seen: (stage, values of the images) in the order in which stages ran.
    """

    def __init__(self) -> None:
        self.gates = [threading.Event() for _ in range(3)]
        self.entered = [threading.Event() for _ in range(3)]
        self.seen: list[tuple[int, list[float]]] = []
        self.open()
        heads = [self._head() for _ in range(3)]
        self.net = eefast.EarlyExitNet([self._stage(i) for i in range(3)], heads, input_shape=(1, 2, 2)).eval()
        self.net.thresholds.copy_(torch.sigmoid(torch.tensor([0.0, -1.0])))
        self.fast = eefast.accelerate(self.net, engine="reference", frozen=True)

    def open(self) -> None:
        for gate in self.gates:
            gate.set()

    def shut(self, stage: int) -> None:
        """From now on the stage waits; what ran before is forgotten."""
        self.gates[stage].clear()
        self.entered[stage].clear()
        self.seen.clear()

    def image(self, value: float) -> torch.Tensor:
        return torch.full((1, 2, 2), value)

    def _stage(self, i: int) -> nn.Module:
        def run(layers: Stage, x: torch.Tensor) -> torch.Tensor:
            self.seen.append((i, x[:, 0, 0, 0].tolist()))
            self.entered[i].set()
            assert self.gates[i].wait(20)
            return x * layers.one.weight

        return Stage(run, one=_one())

    def _head(self) -> nn.Module:
        def run(layers: Stage, x: torch.Tensor) -> eefast.ExitOutput:
            value = x.mean((1, 2, 3)) * layers.one.weight[0, 0, 0, 0]
            return eefast.ExitOutput(torch.stack([value, -value], 1), torch.sigmoid(value), value)

        return Stage(run, one=_one())


def _one() -> nn.Conv2d:
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)
    return conv


@pytest.fixture
def gated():
    made = Gated()
    yield made
    made.open()
