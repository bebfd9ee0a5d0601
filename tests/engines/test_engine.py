"""Images like those before are not checked again; all others are, whatever came before them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import images

from eefast import zoo
from eefast.engines.engine import PlannedEngine
from eefast.engines.program import Plan
from eefast.planning.rows import network_on_maps

SHAPE = (3, 7, 6)


class Counting(PlannedEngine):
    checked = 0

    def prepared(self, x: torch.Tensor) -> torch.Tensor:
        self.checked += 1
        return super().prepared(x)


@pytest.fixture
def engine() -> Any:
    net = zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2).eval()
    return Counting(net, Plan("reference", torch.device("cpu"), torch.float16, net.criterion.name, (), ()))


def test_like_those_before(engine: Any) -> None:
    first, second = images(5, SHAPE), images(5, SHAPE, 1)
    assert engine.prepare(first) is first
    assert engine.prepare(second) is second
    assert engine.checked == 1


def test_rows_like_those_before() -> None:
    net = zoo.eenet("eenet20-1d", 2, num_classes=3, input_shape=(3, 9), filters=2).eval()
    plan = Plan("reference", torch.device("cpu"), torch.float32, net.criterion.name, (), ())
    engine = Counting(network_on_maps(net), plan)
    for seed in range(3):
        x = torch.rand(5, 3, 9, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(engine.prepare(x), x[:, :, None])
    assert engine.checked == 1
    with pytest.raises(ValueError, match=r"^x "):
        engine.prepare(x[:, :, None])
    with pytest.raises(TypeError, match=r"^x "):
        engine.prepare(x.double())


@pytest.mark.parametrize(
    ("other", "error"),
    [
        (torch.zeros(5, 3, 7), ValueError),
        (torch.zeros(5, 1, 7, 6), ValueError),
        (torch.zeros(5, *SHAPE, dtype=torch.float64), TypeError),
        (torch.zeros(5, *SHAPE, dtype=torch.int64), TypeError),
        (torch.zeros(5, *SHAPE, dtype=torch.uint8), ValueError),
        (torch.zeros(5, *SHAPE, device="meta"), ValueError),
        ([[0.0]], TypeError),
    ],
    ids=["dimensions", "channels", "dtype", "integers", "bytes", "device", "no tensor"],
)
def test_others_after_them_are_refused(engine: Any, other: Any, error: Any) -> None:
    engine.prepare(images(5, SHAPE))
    with pytest.raises(error, match=r"^x "):
        engine.prepare(other)


def test_of_several_numbers_dtypes_and_layouts(engine: Any) -> None:
    x = images(5, SHAPE)
    for other in (x, x[:3], x.half(), x, x.to(memory_format=torch.channels_last)):
        assert engine.prepare(other) is other
    assert engine.checked == 4


def test_what_only_autocast_takes_is_refused_without_it(engine: Any) -> None:
    x = images(5, SHAPE).bfloat16()
    with torch.autocast("cpu"):
        assert engine.prepare(x) is x
    with pytest.raises(TypeError, match=r"^x is torch.bfloat16"):
        engine.prepare(x)


def test_the_first_pixels_are_looked_at(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Also where images of this shape came before."""
    engine.net.normalization = ([0.4, 0.5, 0.6], [0.3, 0.2, 0.3])
    with caplog.at_level(logging.WARNING, "eefast"):
        engine.prepare(images(5, SHAPE).clamp(-1, 1))
        assert not caplog.messages
        engine.prepare(100 * images(5, SHAPE))
    assert "images reach from" in caplog.text
    engine.prepare(images(5, SHAPE))
    assert engine.checked == 2  # the warning comes once


def test_where_each_call_makes_other_images(engine: Any) -> None:
    engine.net.normalization = ([0.4, 0.5, 0.6], [0.3, 0.2, 0.3])
    x = torch.full((2, *SHAPE), 255, dtype=torch.uint8)
    wanted = engine.net.prepare(x)
    assert torch.equal(engine.prepare(x), wanted)
    assert torch.equal(engine.prepare(x), wanted)
    assert engine.checked == 2


def test_a_plan_of_another_dtype(engine: Any) -> None:
    x = images(5, SHAPE).half()
    assert engine.prepare(x) is x
    engine.plan = replace(engine.plan, dtype=torch.float32)
    other = Counting(engine.net, engine.plan)
    with pytest.raises(TypeError, match=r"^x is torch.float16"):
        other.prepare(x)
