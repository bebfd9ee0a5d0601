"""What notices changed weights: while optimisers step, and modules come and go."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from eefast.engines import weight_watch
from eefast.engines.weight_watch import WeightWatch


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


class Adapted(nn.Module):
    """A layer with a list of adapters, which is empty at first."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.adapters, self.scales = layer, nn.ModuleList(), nn.ParameterDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        for adapter in self.adapters:
            x = x + adapter(x)
        return x


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.adapters.append(nn.Linear(2, 2)),
        lambda m: m.scales.update({"a": nn.Parameter(torch.ones(1))}),
        lambda m: m.register_buffer("mask", torch.ones(1)),
    ],
    ids=["list", "dictionary", "buffer"],
)
def test_what_was_empty_and_gets_entries_is_noticed(change: Callable[[Adapted], object]) -> None:
    module = Adapted(nn.ReLU())
    watched = WeightWatch(module)
    assert not watched.changed()
    change(module)
    assert watched.changed()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "first", nn.Linear(2, 2)),
        lambda net: net.register_forward_hook(lambda *_: None),
        lambda net: net.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["replaced", "hook", "pre-hook"],
)
def test_changes_of_the_owner_are_noticed(change: Callable[[nn.Module], object]) -> None:
    net = nn.Module()
    net.first, net.second = nn.Linear(2, 2), nn.Linear(2, 2)
    watched = WeightWatch(net.first, net.second, owner=net)
    assert not watched.changed()
    change(net)
    assert watched.changed()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_writes_to_tensors_made_in_inference_mode_are_noticed(name: str) -> None:
    with torch.inference_mode():
        one, other = nn.Linear(3, 5), nn.Linear(3, 5)
        getattr(other, name)[-1] = torch.nan
    watches = [WeightWatch(one), WeightWatch(other)]
    assert [w.compared for w in watches] == [80, 80]
    assert not any(w.changed() for w in watches)
    with torch.inference_mode():
        getattr(one, name)[..., 1].add_(1e-3)
    assert [w.changed() for w in watches] == [True, False]


def test_nothing_is_compared_of_ordinary_tensors() -> None:
    assert WeightWatch(nn.Linear(3, 5)).compared == 0
