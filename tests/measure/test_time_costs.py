"""Time to each exit, by a clock that counts the convolutions that run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import images, lived_in
from torch import nn

from eefast import zoo
from eefast.measure import time_costs
from eefast.measure.time_costs import TimeCosts

SHAPE = (3, 16, 16)


@pytest.fixture(scope="module")
def net() -> Any:
    return lived_in(zoo.eenet("eenet20", 3, "fine", "pool", input_shape=SHAPE), 1)


class Clock:
    """One second for every convolution so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        forward = nn.Conv2d.forward

        def counted(module: Any, x: torch.Tensor) -> torch.Tensor:
            self.seconds += 1.0
            return forward(module, x)

        monkeypatch.setattr(nn.Conv2d, "forward", counted)

    def __call__(self) -> float:
        return self.seconds


def test_time_to_each_exit_by_the_convolutions_on_the_way(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_costs.runtimes, "missing", lambda needs: "not here")
    counts, before = [], 0
    for stage in net.stages:
        before += sum(isinstance(m, nn.Conv2d) for m in stage.modules())
        counts.append(before)
    found = time_costs.measured(net, images(5, SHAPE), clock=Clock(monkeypatch))
    assert found == TimeCosts("PyTorch", 5, tuple(n / counts[-1] for n in counts))


def test_networks_on_rows_have_one_layout() -> None:
    rows = lived_in(zoo.eenet("eenet20-1d", 2, input_shape=(3, 64)), 1).eval()
    found = time_costs.measured(rows, images(4, (3, 1, 64)).squeeze(2))
    assert (found.batch_size, found.cost[-1], len(found.cost)) == (4, 1.0, 3)


def test_the_fastest_way_counts(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A later exit that seems faster costs as much as the one before it."""
    now = [0.0]

    def taking(*seconds: float) -> Any:
        return lambda net, i: lambda x: now.__setitem__(0, now[0] + seconds[i])

    x = images(2, SHAPE)
    ways = {"slow": (taking(1, 1, 1, 9), x), "fast": (taking(2, 4, 3, 8), x)}
    monkeypatch.setattr(time_costs, "_ways", lambda images, dtype: ways)
    assert time_costs.measured(net, x, clock=lambda: now[0]) == TimeCosts("fast", 2, (0.25, 0.5, 0.5, 1.0))


def test_the_mean_of_what_exits_where() -> None:
    assert TimeCosts("PyTorch", 1, (0.25, 0.5, 1.0)).mean([2, 0, 2]) == 0.625


def test_networks_up_to_an_exit_answer_as_it_does(net: Any) -> None:
    x = images(3, SHAPE)
    with torch.no_grad():
        for i, wanted in enumerate(net.all_exits(x)):
            torch.testing.assert_close(net.plain(i)(x), wanted.logits)
    with pytest.raises(ValueError, match="exit_index=4 must be one of 0 … 3"):
        net.plain(4)
