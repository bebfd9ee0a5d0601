"""What is compiled and when, and that planning waits no longer than it has time; a stage that is really compiled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images
from torch import Tensor, nn

from eefast.planning.compiled_stages import CompileTime

SHAPE = (3, 5, 6)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensor], Tensor]], list[Tensor]]:
    """Makes torch.compile return a function; what it is called with."""

    def replace(by: Callable[[Tensor], Tensor]) -> list[Tensor]:
        seen: list[Tensor] = []
        monkeypatch.setattr(torch, "compile", lambda stage, **options: lambda x: (seen.append(x), by(x))[1])
        return seen

    return replace


@pytest.mark.parametrize(("rows", "compiled"), [(7, [7, 1]), (1, [1])])
def test_it_is_compiled_for_the_rows_that_come_and_for_one(rows: int, compiled: list[int], compiling: Any) -> None:
    modes: list[tuple[bool, bool]] = []

    def stage(x: Tensor) -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return x.add_(1)

    seen, x = compiling(stage), images(rows, SHAPE)
    before = x.clone()
    made = CompileTime(100).compiled(nn.Identity(), x)
    assert [len(part) for part in seen] == compiled
    assert modes == [(False, False)] * len(compiled)
    assert torch.equal(x, before)
    assert torch.equal(made(x.clone()), x + 1)


def test_what_takes_too_long_is_not_waited_for(compiling: Any) -> None:
    """Nor is anything else compiled by this plan."""
    ends = threading.Event()
    seen, limit = compiling(lambda x: (ends.wait(60), x)[1]), CompileTime(0.05)
    begin = time.perf_counter()
    try:
        with pytest.raises(TimeoutError, match=r"it did not end within 0.05 s"):
            limit.compiled(nn.Identity(), images(2, SHAPE))
        with pytest.raises(TimeoutError, match=r"the 0.05 s that planning has for it are spent"):
            limit.compiled(nn.Identity(), images(2, SHAPE))
        assert time.perf_counter() - begin < 50
    finally:
        ends.set()
    assert limit.left <= 0
    assert 1 <= len(seen) <= 2


def test_what_it_raises(compiling: Any) -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no kernel")

    compiling(fails)
    limit = CompileTime(100)
    with pytest.raises(ValueError, match="no kernel"):
        limit.compiled(nn.Identity(), images(2, SHAPE))
    assert 0 < limit.left < 100


@pytest.mark.slow
def test_a_compiled_stage_answers_any_number_of_rows() -> None:
    stage = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()).eval()
    made = CompileTime(600).compiled(stage, images(5, SHAPE))
    for n in (1, 2, 5, 9):
        x = images(n, SHAPE)
        torch.testing.assert_close(made(x), stage(x), rtol=1e-4, atol=1e-5)
