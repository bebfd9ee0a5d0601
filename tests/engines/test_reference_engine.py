"""The reference engine: the network's answers, by the rule of its plan, one batch after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds

import eefast
from eefast import zoo
from eefast.engines import Batch

SHAPE = (1, 6, 7)


@pytest.fixture
def net() -> Any:
    made = lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2), 1)
    spread_thresholds(made, images(64, SHAPE), 0.4)
    return made


@pytest.mark.parametrize("n", [0, 1, 3, 31])
def test_answers_are_those_of_the_network(net: Any, n: int) -> None:
    x, engine = images(n, SHAPE), eefast.accelerate(net, engine="reference").engine
    got, expected = engine.run(x, net.thresholds), net(x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("changed", [False, True], ids=["the network's", "changed meanwhile"])
def test_it_runs_by_the_rule_of_its_plan(net: Any, changed: bool) -> None:
    """Another thread may change the network's, with thresholds that belong to that one."""
    x, engine = images(33, SHAPE), eefast.accelerate(net, engine="reference").engine
    expected, thresholds = one_by_one(net, x), net.thresholds.clone()
    if changed:
        net.criterion = eefast.criteria.get("entropy")
    assert_same_answers(engine.run(x, thresholds), expected, net)


def test_a_rule_that_no_name_finds_runs_where_it_is_still_the_network_s(net: Any) -> None:
    engine = eefast.accelerate(net, engine="reference").engine
    net.criterion = replace(net.criterion, comparison="<")
    net.thresholds.fill_(2.0)
    assert engine.run(images(5, SHAPE), net.thresholds).exit_index.tolist() == [0] * 5


def test_a_stream_reads_a_batch_when_its_answer_is_asked_for(net: Any) -> None:
    engine, read = eefast.accelerate(net, engine="reference").engine, []

    def batches() -> Iterator[Batch]:
        for n in (3, 0, 9):
            read.append(n)
            yield Batch(images(n, SHAPE), net.thresholds, net)

    results = engine.stream(batches())
    assert not read
    for i, n in enumerate((3, 0, 9)):
        result = next(results)
        assert read == [3, 0, 9][: i + 1]
        assert_same_answers(result, net(images(n, SHAPE)), net)
        assert not result.logits.requires_grad
