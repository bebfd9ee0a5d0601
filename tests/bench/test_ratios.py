"""Ratios: calls take turns, medians are of ratios round by round, a missed bound and a wrong answer are shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ratios
from rows import RatioRow
from torch import nn

from eefast import zoo

ROW = RatioRow("a", "net", 3, "ms", 2.0, 4.0, "other", 0.5, 1.05, True, 5, True)


def test_calls_take_turns_after_one_call_each() -> None:
    order: list[str] = []
    times = ratios.measured([lambda: order.append("a"), lambda: order.append("b")], 2)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert [len(each) for each in times] == [2, 2]
    assert all(seconds >= 0 for each in times for seconds in each)


def test_the_ratio_is_that_of_rounds() -> None:
    times = [(1.0, 2.0), (9.0, 3.0), (4.0, 4.0)]
    assert ratios.median_ratio(times) == 1.0
    assert ratios.medians(times, 1e3) == (4000.0, 3000.0)


@pytest.mark.parametrize(
    ("changed", "missed"),
    [({}, False), ({"ratio": 1.06}, True), ({"at_most": False}, True), ({"at_most": False, "ratio": 1.06}, False)],
    ids=str,
)
def test_bounds_on_both_sides(changed: dict[str, float], missed: bool) -> None:
    row = replace(ROW, **changed)
    assert ratios.reached(row) is not missed
    assert ("MISSED" in ratios.show([row])) is missed
    assert "WRONG" in ratios.show([replace(row, checked=False)])


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_trains_what_it_should(frozen: bool) -> None:
    net = zoo.eenet("eenet8", input_shape=(1, 9, 9))
    conv = next(m for m in net.stages.modules() if isinstance(m, nn.Conv2d))
    before, head = conv.weight.detach().clone(), net.heads[0].classifier.weight.detach().clone()  # type: ignore[union-attr]
    x = ratios.torch.rand(4, 1, 9, 9)
    ratios.step_of(net, x, ratios.torch.tensor([0, 1, 2, 3]), frozen)()
    assert bool((conv.weight == before).all()) is frozen
    assert not bool((net.heads[0].classifier.weight == head).all())  # type: ignore[union-attr]
