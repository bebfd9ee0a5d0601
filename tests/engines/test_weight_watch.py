"""What notices changed weights: while optimisers step, modules come and go, and other threads plan."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn

import eefast
from eefast import zoo
from eefast.engines import weight_watch
from eefast.engines.weight_watch import WeightWatch

SHAPE = (1, 6, 7)


def step() -> None:
    """One step of an optimiser that no watch sees."""
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    torch.optim.SGD([weight], lr=0.1).step()


class Asked(WeightWatch):
    """Another watch begins while an optimiser asks this one."""

    others: list[WeightWatch]

    @property
    def _tensors(self) -> list[Any]:
        if hasattr(self, "others"):
            self.others += [WeightWatch(nn.Linear(2, 2)) for _ in range(9)]
        return self.tensors

    @_tensors.setter
    def _tensors(self, tensors: list[Any]) -> None:
        self.tensors = tensors


def test_watches_that_begin_while_an_optimiser_steps() -> None:
    asked = Asked(nn.Linear(2, 2))
    asked.others = []
    for _ in range(3):
        step()
    assert len(asked.others) == 27
    assert not asked.changed()


def test_threads_that_watch_while_others_step() -> None:
    done, failed = threading.Event(), []

    def watching() -> None:
        kept = [WeightWatch(nn.Linear(2, 2)) for _ in range(100)]
        while not done.is_set():
            kept.append(WeightWatch(nn.Linear(2, 2)))
            kept.pop(0)

    def stepping() -> None:
        try:
            for _ in range(150):
                step()
        except RuntimeError as error:
            failed.append(error)

    watchers, steppers = ([threading.Thread(target=f) for _ in range(2)] for f in (watching, stepping))
    for thread in (*watchers, *steppers):
        thread.start()
    for thread in steppers:
        thread.join()
    done.set()
    for thread in watchers:
        thread.join()
    assert not failed


def test_a_step_is_noticed_by_those_alone_whose_weights_it_changes() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    watches = [WeightWatch(one), WeightWatch(other), WeightWatch(nn.Sequential(one, other))]
    one(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(one.parameters(), lr=0.1, fused=True).step()
    assert [w.changed() for w in watches] == [True, False, True]


def test_unreferenced_watches_are_forgotten() -> None:
    before = len(weight_watch._watches)
    for _ in range(20):
        WeightWatch(nn.Linear(2, 2))
    gc.collect()
    assert len(weight_watch._watches) <= before


def test_modules_that_come_and_go_while_it_looks() -> None:
    module, done = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20))), threading.Event()
    watched = WeightWatch(module)

    def changing() -> None:
        while not done.is_set():
            module.add_module("more", nn.Linear(2, 2))
            module.register_buffer("b", torch.zeros(1))
            del module.more, module.b

    thread = threading.Thread(target=changing)
    thread.start()
    try:
        for _ in range(3000):
            watched.changed()
    finally:
        done.set()
        thread.join()
    assert not watched.changed()


@pytest.fixture
def net() -> Any:
    net = lived_in(zoo.eenet("eenet8", 2, num_classes=3, input_shape=SHAPE, filters=2), 1)
    spread_thresholds(net, images(64, SHAPE), 0.4)
    return net


def change(net: Any) -> None:
    with torch.no_grad():
        net.heads[-1].classifier.weight.mul_(-1.0)


class TestPlanning:
    def test_many_threads_make_one_plan(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        fast, x, make, plans, answers = eefast.accelerate(net), images(33, SHAPE), eefast.api.build, [], []

        def counted(*args: Any) -> Any:
            plans.append(make(*args))
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", counted)
        change(net)
        expected = one_by_one(net, x)
        threads = [threading.Thread(target=lambda: answers.append(fast.forward(x))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(plans) == 1
        assert len(answers) == 4
        for answer in answers:
            assert_same_answers(answer, expected, net)

    @pytest.mark.parametrize("engine", ["compact", "auto"])
    def test_what_changes_meanwhile_is_noticed(self, net: Any, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another thread writes new weights after the old ones have been read."""
        fast, x, make, plans = eefast.accelerate(net, engine=engine), images(33, SHAPE), eefast.api.build, []

        def slow(*args: Any) -> Any:
            plans.append(make(*args))
            if len(plans) == 1:
                change(net)
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", slow)
        with torch.no_grad():
            next(net.parameters()).mul_(1.1)
        got = fast(x)
        assert_same_answers(got, one_by_one(net, x), net)
        assert len(plans) == 2
        fast(x)
        assert len(plans) == 2

    def test_a_network_that_always_changes_is_planned_all_the_same(
        self, net: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fast, make, plans = eefast.accelerate(net, engine="compact"), eefast.api.build, []
        x = images(5, SHAPE)

        def changing(*args: Any) -> Any:
            change(net)
            plans.append(make(*args))
            change(net)
            return plans[-1]

        monkeypatch.setattr("eefast.api.build", changing)
        change(net)
        for _ in range(2):
            assert len(fast(x).labels) == 5
            assert fast.plan is plans[-1].plan
        assert len(plans) == 2

    def test_plans_of_other_modules_go_on_within_one(self, net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """For instance where a finaliser, or a stage, calls an accelerated module."""
        fast, other, make = eefast.accelerate(net), eefast.accelerate(net, engine="compact"), eefast.api.build
        monkeypatch.setattr(
            "eefast.api.build", lambda *args: (other.warmup() if args[1].engine == "auto" else None, make(*args))[1]
        )
        change(net)
        x = images(5, SHAPE)
        assert_same_answers(fast(x), one_by_one(net, x), net)
