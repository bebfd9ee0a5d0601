"""What a plan says of engines' times: ratios of medians, beside the network without exits where that can be timed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from networks import images
from torch import nn

from eefast import zoo
from eefast.planning import engine_times, probe
from eefast.planning.engine_times import Times, measure
from eefast.planning.trial import Subject

SHAPE = (1, 6, 7)


@pytest.fixture
def net() -> Any:
    return zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2).eval()


def subject(net: Any, **more: Any) -> Subject:
    return Subject(net, torch.device("cpu"), torch.float32, (), **more)


def engine(calls: list[Any]) -> Any:
    return SimpleNamespace(run=lambda images, thresholds: calls.append((images, thresholds.tolist())))


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        (0, "1.5× as fast as b, 2.5× as fast as PyTorch without exits ({}: 2.0 ms, 3.0, 5.0)"),
        (1, "0.7× as fast as a, 1.7× as fast as PyTorch without exits ({}: 3.0 ms, 2.0, 5.0)"),
    ],
)
def test_ratios_are_those_of_medians(chosen: int, sentence: str) -> None:
    times = Times(7, least=(0.001, 0.001), usual=(0.002, 0.003), plain=0.005)
    assert times.sentence("ab", chosen) == sentence.format("7 images to the final exit, medians")


def test_without_the_plain_network_engines_are_compared_alone() -> None:
    times = Times(7, least=(0.001, 0.001), usual=(0.002, 0.003), plain=None)
    assert times.sentence("ab", 0) == "1.5× as fast as b (7 images to the final exit, medians: 2.0 ms, 3.0)"
    assert Times(7, (0.001,), (0.002,), None).sentence("a", 0) is None


@pytest.mark.parametrize("large", [False, True])
def test_engines_and_the_plain_network_take_turns_on_the_same_images(
    net: Any, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """Of large networks, whose plain runs take long, engines only."""
    monkeypatch.setattr(probe, "is_large", lambda net: large)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # else each runs once more after a rest
    calls: list[Any] = []
    net.stages[0].register_forward_pre_hook(lambda module, given: calls.append((given[0], "plain")))
    examples = images(3, SHAPE)
    found = measure(subject(net, example_inputs=examples), [engine(calls), engine(calls)], rounds=2)
    never = [net.criterion.never] * 2
    assert [what for _, what in calls] == [never, never, *([] if large else ["plain"])] * 2
    assert all(torch.equal(x, examples[torch.arange(8) % 3].repeat(1 if large else 2, 1, 1, 1)) for x, _ in calls)
    assert found.count == (8 if large else 16)
    assert (found.plain is None) == large
    assert all(0 < least <= usual for least, usual in zip(found.least, found.usual, strict=True))


def test_the_least_and_the_median_of_rounds(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = [[9.0, 1.0, 3.0, 8.0], [9.0, 5.0, 6.0, 7.0], [1.0, 2.0, 2.5, 9.0]]
    monkeypatch.setattr(probe, "turns_on_cpu", lambda runs: rounds)
    assert measure(subject(net), [engine([])] * 2) == Times(16, (1.0, 5.0), (3.0, 6.0), 2.5)


def test_a_head_without_a_classifier_is_not_timed_as_a_plain_network(net: Any) -> None:
    net.heads[-1] = nn.Identity()
    assert measure(subject(net), [engine([])], rounds=2).plain is None


def test_a_network_in_half_precision_gets_images_in_it(net: Any) -> None:
    assert measure(subject(net.double()), [engine([])], rounds=1).plain is not None


def test_integers_are_not_timed_in_pytorch(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_times, "is_quantized", lambda net: True)
    assert measure(subject(net), [engine([])], rounds=1).plain is None
