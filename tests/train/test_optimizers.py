"""Learning rates by step, beside their formulas."""

import math
from collections.abc import Callable

import pytest
import torch

from eefast.train.optimizers import SCHEDULES


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda step: 1.0),
        ("cosine", lambda step: (1 + math.cos(math.pi * step / 40)) / 2),
        ("step", lambda step: 0.1 ** ((step >= 20) + (step >= 30))),
    ],
)
def test_schedules(schedule: str, expected: Callable[[int], float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule_of = SCHEDULES[schedule](optimizer, 0.3, 40)
    for step in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * expected(step))
        optimizer.step()
        schedule_of.step()
