"""Whole compact engines are compared where libraries run some of their stages and PyTorch's threads spin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import lived_in
from runtime_stages import in_a_library

from eefast import zoo
from eefast.engines import CompactEngine
from eefast.planning import beside_openmp, compact_steps, probe, trial
from eefast.planning.beside_openmp import ALL_STAGES, NO_STAGE
from eefast.planning.compact_steps import build_compact
from eefast.planning.stage_runtimes import LIBRARIES, Chosen
from eefast.planning.trial import Subject

SHAPE = (1, 6, 7)


@pytest.fixture(scope="module")
def subject() -> Subject:
    net: Any = lived_in(zoo.eenet("eenet8", 2, "linear", "pool", 3, input_shape=SHAPE, filters=2), 1)
    return Subject(net, torch.device("cpu"), torch.float32, trial.expected(net, probe.images(net)))


@pytest.fixture
def threads() -> Iterator[Any]:
    """Sets how many there are."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fastest(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which stages are the fastest in a library, "L", and which in PyTorch, "P", where both are allowed."""

    def stages(letters: str) -> None:
        each: dict[str, Iterator[str]] = {}

        def chosen(stage: Any, folded: Chosen, seen: Any, layout: Any, asked: str, *rest: Any) -> Chosen:
            wanted = {LIBRARIES: "LLL", "pytorch": "PPP"}.get(asked, letters)
            in_library = next(each.setdefault(asked, iter(wanted))) == "L"
            return replace(folded, stage=in_a_library(folded.stage, seen)) if in_library else folded

        monkeypatch.setattr(compact_steps, "chosen", chosen)
        monkeypatch.setattr(compact_steps, "missing_runtimes", lambda: [])

    return stages


def kinds(engine: CompactEngine) -> str:
    return "".join("P" if beside_openmp.uses_openmp(step.stage) else "L" for step in engine.steps)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says the seconds of engines by their stages and whether exits run in one thread; notes what was measured."""
    measured = list[Any]()

    def given(table: dict[str, float]) -> list[Any]:
        def timed(runs: Any, rounds: int, patience: float) -> list[float]:
            engines = [run.func.__self__ for run in runs]
            names = [kinds(engine) + "1" * engine.in_one_thread for engine in engines]
            x, limits = runs[0].args
            if len(x) > 1:
                exits = engines[0].run(x, limits).exit_index
                assert exits.tolist() == [i % 3 for i in range(len(x))]
            measured.append((names, len(x)))
            return [table.get(name, 9.0) for name in names]

        monkeypatch.setattr(probe, "seconds_on_cpu", timed)
        return measured

    return given


def test_where_nothing_else_runs_stages_and_on_one_thread_nothing_is_measured(
    subject: Subject, threads: Any, fastest: Any, seconds: Any
) -> None:
    measured = seconds({})
    for number, stages in ((2, "PPP"), (1, "PLL"), (1, "LLL")):
        threads(number)
        fastest(stages)
        found = build_compact(subject)
        assert (kinds(found), found.in_one_thread) == (stages, False)
    assert not measured


@pytest.mark.parametrize(
    ("table", "in_one_thread"),
    [({"LLL1": 1.0, "LLL": 1.1}, True), ({"LLL1": 1.0, "LLL": 0.95}, True), ({"LLL1": 1.0, "LLL": 0.8}, False)],
)
def test_exits_run_in_one_thread_unless_that_is_clearly_slower(
    table: dict[str, float], in_one_thread: bool, subject: Subject, threads: Any, fastest: Any, seconds: Any
) -> None:
    threads(2)
    fastest("LLL")
    measured = seconds(table)
    found = build_compact(subject)
    assert (kinds(found), found.in_one_thread, found.plan.reasons) == ("LLL", in_one_thread, ())
    assert measured == [(["LLL1", "LLL"], 1), (["LLL1", "LLL"], 64)]


@pytest.mark.parametrize(
    ("table", "stages", "in_one_thread", "reasons"),
    [
        ({"PLL1": 1.0, "LLL1": 1.1, "PPP": 1.2}, "PLL", True, ()),
        ({"PLL1": 1.1, "LLL1": 1.0, "PPP": 1.2}, "LLL", True, (NO_STAGE,)),
        ({"PLL1": 1.1, "LLL1": 1.0, "PPP": 0.8}, "PPP", False, (ALL_STAGES,)),
    ],
)
def test_of_small_images_also_engines_without_pytorch_and_with_nothing_else_are_compared(
    table: dict[str, float], stages: str, in_one_thread: bool, reasons: Any,
    subject: Subject, threads: Any, fastest: Any, seconds: Any,
) -> None:  # fmt: skip
    threads(2)
    fastest("PLL")
    measured = seconds(table)
    found = build_compact(subject)
    assert (kinds(found), found.in_one_thread, found.plan.reasons) == (stages, in_one_thread, reasons)
    forms = ["PLL1", "LLL1", "PPP1", "PLL", "LLL", "PPP"]
    assert measured == [(forms, 1), (forms, 64)]


def test_of_large_images_only_the_exits_are_compared(
    subject: Subject, threads: Any, fastest: Any, seconds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(2)
    fastest("PLL")
    monkeypatch.setattr(beside_openmp, "has_large_images", lambda net: True)
    monkeypatch.setattr(probe, "is_large", lambda net: True)
    measured = seconds({"PLL1": 1.0})
    assert kinds(build_compact(subject)) == "PLL"
    assert measured == [(["PLL1", "PLL"], probe.IMAGES)]


def test_answers_are_those_of_the_network(subject: Subject, threads: Any, fastest: Any) -> None:
    threads(2)
    fastest("PLP")
    net, found = subject.net, build_compact(subject)
    x = probe.noise(31, SHAPE)
    got, wanted = found.run(x, net.thresholds), net(x)
    assert torch.equal(got.exit_index, wanted.exit_index)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)
