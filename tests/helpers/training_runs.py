"""Training runs of a second, for tests of what happens around them."""

from typing import Any

from eefast.train.options import TrainOptions
from eefast.train.report import TrainReport
from eefast.train.run import train

RESUMABLE = {
    "net": "eenet8",
    "num_exits": 2,
    "epochs": 3,
    "held_out": 708,
    "batch_size": 16,
    "loss": "v4+v2",
    "two_stage": 1,
    "shift": 1,
    "flip": True,
    "device": "cpu",
}


def trained(**options: Any) -> TrainReport:
    return train(TrainOptions(**options))
