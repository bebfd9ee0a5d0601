"""Calls → seconds: each repeated until a clock can tell it, several of them in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

# Threads of ONNX Runtime and OpenMP that spin after a call have stopped by then.
PAUSE_SECONDS = 0.06


def mean_seconds(
    call: Callable[[], Any],
    least: float = 0.0,
    wait: Callable[[], Any] = lambda: None,
    clock: Callable[[], float] | None = None,
) -> float:
    """Seconds per call: the mean of as many calls as take `least` seconds together, at least one.

    wait: returns when the device has done its work; it is part of each call. clock: in seconds, by default
    `time.perf_counter`.
    """
    clock = clock or time.perf_counter
    wait()
    begin, calls = clock(), 0
    while True:
        call()
        wait()
        calls += 1
        passed = clock() - begin
        if passed >= least:
            return passed / calls


def run_all(run: Callable[[Any], Any], batches: Iterable[Any]) -> None:
    """Each batch; no answer is kept."""
    for x in batches:
        run(x)


def in_turns(turns: Sequence[Callable[[], Result]], number: int) -> list[Result]:
    """Round `number` of a measurement: every turn once, backwards in odd rounds, so that a drift hits all alike.

    Returns what the turns return, in the order of `turns`.
    """
    order = range(len(turns)) if number % 2 == 0 else reversed(range(len(turns)))
    found = {i: turns[i]() for i in order}
    return [found[i] for i in range(len(turns))]


def quantiles(values: Sequence[float], shares: Sequence[float]) -> tuple[float, ...]:
    """shares: 0 … 1; between two values on a straight line."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(shares, dtype=torch.float64)).tolist())
