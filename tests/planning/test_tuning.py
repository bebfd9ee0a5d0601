"""Which algorithm and group size each section of the resident engine takes, measured by times that are given."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import ops, zoo
from eefast.planning import tuning
from eefast.planning.layers import Lowered
from eefast.planning.lowering import lower

pytestmark = [
    pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}"),
    pytest.mark.usefixtures("nothing_measured"),
]

SHAPE = (3, 16, 16)
CANDIDATES = [(algorithm, group) for algorithm in tuning.ALGORITHMS for group in tuning.GROUPS]


@pytest.fixture(scope="module")
def net() -> Any:
    made = lived_in(zoo.eenet("eenet20", 3, "linear", "conv1", input_shape=SHAPE), 1)
    spread_thresholds(made, images(65, SHAPE), 0.4)
    return made


@pytest.fixture(scope="module")
def lowered(net: Any) -> Lowered:
    return lower(net)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return images(65, SHAPE)


@pytest.fixture
def nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "choices", {})


def test_sections_take_the_fastest_algorithm_and_the_plan_shows_it(
    net: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # F(2×2) is fastest at the first size, F(4×4) in groups at the second, direct convolution at the last.
    best = [(2, 1), (4, 4), (0, 1)]
    run = tuning.run

    def timed(net: Any, program: Any, images: Any, limits: Any, seconds: Any = None) -> torch.Tensor:
        if seconds is not None:
            mine = zip(program.algorithms, program.groups.tolist(), strict=True)
            seconds += torch.tensor([1.0 if a == b else 2.0 for a, b in zip(mine, best, strict=True)])
        return run(net, program, images, limits, seconds if seconds is None else seconds.clone())

    monkeypatch.setattr(tuning, "run", timed)
    fast: Any = eefast.accelerate(net, engine="resident")
    assert (fast.engine.program.algorithms, fast.engine.program.group_sizes) == ((2, 4, 0), (1, 4, 1))
    text = str(fast.plan)
    assert "16×16 F(2×2), 8×8 F(4×4) by 4" in text
    assert "4×4 direct" in text
    assert "Winograd's logits differ from direct convolution's by" in text
    assert_same_answers(fast(x), one_by_one(net, x), net)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({(4, 1): 1.0}, (4, 1)),
        ({(0, 1): 1.0, (2, 4): 0.95}, (0, 1)),
        ({(0, 1): 1.0, (2, 4): 0.9}, (2, 4)),
        ({(0, 1): 1.0, (2, 4): 0.9, (4, 8): 0.85}, (2, 4)),
        ({(0, 4): 1.0, (2, 4): 0.99, (4, 8): 0.98}, (2, 4)),
    ],
    ids=["alone", "a group that gains 5 %", "a group that gains 10 %", "the smaller of two", "its fastest algorithm"],
)
def test_larger_groups_must_pay(
    net: Any, seconds: dict[tuple[int, int], float], chosen: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two sections the other one takes as long by all algorithms."""

    def timed(net: Any, candidate: Any, images: Any, thresholds: Any, spent: torch.Tensor) -> None:
        (algorithm, _), (group, _) = candidate
        spent += torch.tensor([seconds.get((algorithm, group), 2.0), 1.0])

    monkeypatch.setattr(tuning, "run", timed)
    algorithms, groups = tuning.fastest(net, 2, tuning.ALGORITHMS, lambda *candidate: candidate, torch.empty(0))  # type: ignore
    assert (algorithms[0], groups[0]) == chosen
    assert (algorithms[1], groups[1]) == (0, 1)


@pytest.mark.parametrize(("alone", "group"), [(1.0, 1), (1.05, 1), (1.1, 4)])
def test_of_large_networks_samples_alone_are_timed_by_the_algorithm_of_groups(
    net: Any, alone: float, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, together = [], {0: [3.0, 1.0], 2: [1.0, 2.0], 4: [2.0, 3.0]}

    def timed(net: Any, candidate: Any, images: Any, thresholds: Any, spent: torch.Tensor) -> None:
        calls.append(candidate)
        algorithms, groups = candidate
        of_groups = [together[a][section] for section, a in enumerate(algorithms)]
        spent += torch.tensor(of_groups if groups == (4, 4) else [alone, 2.0])

    monkeypatch.setattr(tuning, "run", timed)
    found = tuning.fastest_of_large(net, 2, tuning.ALGORITHMS, lambda *candidate: candidate, torch.empty(0))  # type: ignore
    assert found == ((2, 0), (group, 4))
    assert calls == [*(((a, a), (4, 4)) for a in tuning.ALGORITHMS), ((2, 0), (1, 1))]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, tuning.ROUNDS), (2.0, 1)], ids=["quick", "slow"])
def test_slow_networks_are_measured_in_one_round(
    net: Any, seconds: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, clock = [], SimpleNamespace(perf_counter=lambda: seconds * len(calls) / len(CANDIDATES))
    monkeypatch.setattr(tuning, "time", clock)
    monkeypatch.setattr(tuning, "run", lambda net, candidate, *_: calls.append(candidate))
    tuning.fastest(net, 1, tuning.ALGORITHMS, lambda *candidate: candidate, torch.empty(0))  # type: ignore
    assert calls == [((algorithm,), (group,)) for algorithm, group in CANDIDATES] * rounds


def test_a_geometry_is_measured_once(net: Any, lowered: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def direct(net: Any, sections: int, algorithms: tuple[int, ...], *_: Any) -> tuning.Choice:
        measured.append(algorithms)
        return (0,) * sections, (1,) * sections

    monkeypatch.setattr(tuning, "fastest", direct)
    other_weights = lower(lived_in(zoo.eenet("eenet20", 3, "linear", "conv1", input_shape=SHAPE), 2))
    other_size = lower(zoo.eenet("eenet20", 3, "linear", "conv1", input_shape=(3, 17, 16)))
    for case, bfloat16 in ((lowered, False), (other_weights, False), (lowered, True), (other_size, False)):
        _, note = tuning.tuned(net, case, bfloat16, torch.empty(0))
        assert note == ""
    # Once for both weights; for bfloat16, which has no Winograd; for the other size.
    assert measured == [tuning.ALGORITHMS, (0,), tuning.ALGORITHMS]


@pytest.mark.parametrize(
    ("errors", "algorithms"),
    [
        ({(1, 4): 2e-5}, (4, 4, 2)),
        ({(1, 4): 1e-3}, (4, 2, 2)),
        ({(1, 4): 1e-3, (1, 2): 1e-3, (0, 4): 1e-5}, (4, 0, 2)),
        ({(0, 4): 2e-5, (1, 4): 2.1e-5}, (4, 2, 2)),
        ({(0, 4): torch.nan, (0, 2): torch.nan}, (0, 4, 2)),
    ],
    ids=["within the bound", "smaller tiles", "direct", "the larger of two", "NaN"],
)
def test_the_section_that_errs_most_takes_smaller_tiles(
    net: Any, lowered: Lowered, errors: dict[tuple[int, int], float], algorithms: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(net: Any, program: Any, images: Any) -> torch.Tensor:
        return torch.ones(1, dtype=torch.float64) + sum(errors.get(at, 0) for at in enumerate(program.algorithms))

    monkeypatch.setattr(tuning, "fastest", lambda *_: ((4, 4, 2), (1, 4, 1)))
    monkeypatch.setattr(tuning, "all_logits", logits)
    program, note = tuning.tuned(net, lowered, False, torch.empty(0))
    assert (program.algorithms, program.group_sizes) == (algorithms, (1, 4, 1))
    assert note.startswith("Winograd's logits differ from direct convolution's by ")


def test_winograd_that_errs_too_much_gives_way_to_direct_convolution(
    net: Any, lowered: Lowered, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the errors that the kernels make."""
    monkeypatch.setattr(tuning, "fastest", lambda *_: ((4, 4, 4), (1, 1, 1)))
    program, note = tuning.tuned(net, lowered, False, x[:8])
    assert program.algorithms == (4, 4, 4)
    error = float(note.split("differ from direct convolution's by ")[1].split()[0])
    assert 1e-8 < error < tuning.WINOGRAD_BOUND
    monkeypatch.setattr(tuning, "WINOGRAD_BOUND", error / 1.5)
    assert tuning.tuned(net, lowered, False, x[:8])[0].algorithms != (4, 4, 4)
    monkeypatch.setattr(tuning, "WINOGRAD_BOUND", 0.0)
    assert tuning.tuned(net, lowered, False, x[:8])[0].algorithms == (0, 0, 0)


def test_direct_convolution_can_be_forced(net: Any, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EEFAST_CONV", "direct")
    fast: Any = eefast.accelerate(net, engine="resident")
    assert not any(fast.engine.program.algorithms)
    assert "F(" not in str(fast.plan)
    assert_same_answers(fast(x), one_by_one(net, x), net)
    monkeypatch.setenv("EEFAST_CONV", "fft")
    with pytest.raises(ValueError, match="EEFAST_CONV='fft' is unknown; set it to direct"):
        eefast.accelerate(net, engine="resident")
