"""Contexts in which modules are tried: what they set, and that all of it is afterwards as before."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from eefast.modules.contexts import isolated, mode, same_randomness

CPU = torch.device("cpu")


def partly_frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(), nn.ReLU()))
    module[1].eval()
    return module


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_every_module_is_in_the_mode_and_gets_its_flag_back(training, fails):
    module = partly_frozen()
    before = [m.training for m in module.modules()]
    try:
        with mode(module, training):
            assert {m.training for m in module.modules()} == {training}
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert [m.training for m in module.modules()] == before == [True, True, False, False, False]


def test_a_module_that_is_added_meanwhile_keeps_its_flag():
    module = partly_frozen()
    with mode(module, False):
        module.append(nn.ReLU())
    assert module[-1].training


@pytest.mark.parametrize(
    "around",
    [torch.inference_mode, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["inference", "gradients", "autocast"],
)
def test_the_modes_of_the_caller_do_not_reach_inside(around):
    weight = torch.ones(2, 2)
    with around():
        modes = torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        with isolated(CPU):
            assert not torch.zeros(1).is_inference()
            assert not torch.is_grad_enabled()
            assert (weight @ weight).dtype == torch.float32
        assert modes == (
            torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
        )  # fmt: skip


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.random, lambda: float(torch.rand(1))],
    ids=["python", "numpy", "torch"],
)
@pytest.mark.parametrize("fails", [False, True])
def test_random_generators_go_on_where_they_were(draw, fails):
    with same_randomness(CPU):
        expected = draw()
    try:
        with same_randomness(CPU):
            assert draw() == expected
            draw()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert draw() == expected
    assert draw() != expected
