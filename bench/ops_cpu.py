"""Microbenchmarks of the ops on the CPU, with pytest-benchmark; providers take turns, so that noise falls on all."""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from op_cases import BASELINES, COPY, READ, Inputs, OpCase, Provider, cpu_cases, make_inputs, providers
from ops import QUANTILES, Call, Ceilings, attempt, measure_ceilings, timed, untimed
from rows import OpRow, append, environment

TURNS = 5
TURN_SECONDS = 0.1
# Maps from here on are larger than last-level caches; there a plain copy takes its turns as well.
LARGE = 2**26

Spans = dict[tuple[OpCase, Provider], list[list[float]]]


def _providers(case: OpCase) -> tuple[Provider, ...]:
    found = providers(case)
    if case.map_bytes >= LARGE:
        return (*found, COPY)
    return (*found, READ) if case.op == "exit_head" and case.dtype == torch.float32 else found


PLAN = [(case, turn, provider) for case in cpu_cases() for turn in range(TURNS) for provider in _providers(case)]


@lru_cache(maxsize=1)
def _inputs(case: OpCase) -> Inputs:
    return make_inputs(case, "cpu")


@lru_cache(maxsize=8)
def _attempt(case: OpCase, provider: Provider) -> tuple[Call | None, str]:
    return attempt(provider, _inputs(case))


@pytest.fixture(scope="module")
def spans() -> Iterator[Spans]:
    """Collects seconds per call, turn by turn, and writes the rows at the end; an empty list: nothing to time."""
    found: Spans = {}
    ceilings, rows = measure_ceilings("cpu", [torch.float32], 2**28, 2048, _seconds)
    yield found
    if found:
        append([*rows, *_rows(found, ceilings[torch.float32])], environment("cpu"))


def _seconds(call: Call) -> float:
    return min(timeit.repeat(call, repeat=5, number=1))


@pytest.mark.parametrize(("case", "turn", "provider"), PLAN, ids=lambda value: getattr(value, "name", str(value)))
def test_speed(benchmark: Any, spans: Spans, case: OpCase, turn: int, provider: Provider) -> None:
    turns = spans.setdefault((case, provider), [])
    call, note = _attempt(case, provider)
    if call is None:
        pytest.fail(note)
    estimate = _seconds(call)
    iterations = max(1, round(1e-4 / estimate))
    rounds = max(3, round(TURN_SECONDS / (iterations * estimate)))
    benchmark.pedantic(call, rounds=rounds, iterations=iterations)
    turns.append(benchmark.stats.stats.data)


def _rows(spans: Spans, ceilings: Ceilings) -> list[OpRow]:
    quantiles = {key: _quantiles(turns) for key, turns in spans.items() if turns}
    rows = []
    for case, provider in spans:
        if (case, provider) not in quantiles:
            rows.append(untimed(case, provider, _attempt(case, provider)[1]))
            continue
        typical = {other.name: found[0] for (c, other), found in quantiles.items() if c == case}
        beside = ceilings
        if COPY.name in typical:
            beside = Ceilings(2 * case.map_bytes / typical[COPY.name], ceilings.matmul)
        baseline = next((typical[name] for name in BASELINES if name in typical), None)
        seconds = quantiles[case, provider]
        rows.append(timed(case, provider, "launch", seconds, seconds[0], baseline, beside))
    return rows


def _quantiles(turns: list[list[float]]) -> list[float]:
    samples = torch.tensor([s for turn in turns for s in turn], dtype=torch.float64)
    return samples.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
