"""What planning measures with: images, thresholds that choose the exit, a timer that takes turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from networks import images, lived_in

import eefast
from eefast import criteria, zoo
from eefast.planning import probe

SHAPE = (1, 6, 7)


@pytest.fixture(scope="module")
def net() -> eefast.EarlyExitNet:
    return lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2), 1)  # type: ignore


@pytest.mark.parametrize("n", [1, 3, probe.IMAGES, 20])
def test_examples_are_repeated_or_cut(net: eefast.EarlyExitNet, n: int) -> None:
    x = images(n, SHAPE).double()
    found = probe.images(net, x)
    assert torch.equal(found, torch.cat([x] * probe.IMAGES)[: probe.IMAGES].float())
    assert found.is_contiguous()


@pytest.mark.parametrize("examples", [None, torch.empty(0, *SHAPE)], ids=["None", "empty"])
def test_without_examples_it_is_the_same_noise_at_every_call(net: eefast.EarlyExitNet, examples: None) -> None:
    found = probe.images(net, examples)
    torch.manual_seed(5)
    assert torch.equal(found, probe.images(net, examples))
    assert found.shape == (probe.IMAGES, *SHAPE)
    # No two images are alike, so what depends on the batch shows.
    assert len(found.flatten(1).unique(dim=0)) == probe.IMAGES


@pytest.mark.parametrize("exit_index", [0, 1, 2])
@pytest.mark.parametrize("criterion", criteria.CRITERIA)
def test_all_images_take_the_exit_that_the_thresholds_choose(
    net: eefast.EarlyExitNet, criterion: str, exit_index: int
) -> None:
    other = net.with_criterion(criterion).eval()
    other.thresholds.copy_(probe.thresholds(other, exit_index))
    assert other(images(31, SHAPE)).exit_index.tolist() == [exit_index] * 31


def test_runs_take_turns_and_the_least_of_their_times_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([value for r in range(3) for value in (0, 10 - r, 0, 20 + r)])
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls: list[str] = []
    assert probe.fastest_of([lambda: calls.append("a"), lambda: calls.append("b")], 3) == [8, 20]
    assert calls == ["a", "b"] * 3


def test_the_median_leaves_out_the_round_that_warms_up() -> None:
    assert probe.usual([9.0, 1.0, 5.0, 2.0]) == 2.0
    assert probe.usual([9.0]) == 9.0


@pytest.mark.parametrize(
    ("threads", "seconds", "least", "all_rounds"),
    [
        (1, 0.01, "aaaaaa", "aaaa"),
        # The run after a rest does not count.
        (2, 0.01, "a raa raa raa raa a", "a raa raa raa"),
        (2, 0.06, "aaa", "aaa"),
    ],
)
def test_with_several_threads_short_runs_begin_after_a_rest(
    threads: int, seconds: float, least: str, all_rounds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(probe, "LIMIT", 0.15)
    now, calls = [0.0], list[str]()
    clock = {name: lambda: now[0] for name in ("process_time", "perf_counter")}
    monkeypatch.setattr(probe, "time", SimpleNamespace(sleep=lambda seconds: calls.append("r"), **clock))

    def run() -> None:
        # What comes after a rest takes longer.
        now[0] += 9 if calls[-1:] == ["r"] else seconds
        calls.append("a")

    assert probe.seconds_on_cpu([run], 6) == pytest.approx([seconds])
    assert "".join(calls) == least.replace(" ", "")
    calls.clear()
    (found,) = probe.turns_on_cpu([run], 4)
    assert found == pytest.approx([seconds] * len(found))
    assert "".join(calls) == all_rounds.replace(" ", "")
