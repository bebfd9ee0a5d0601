"""Folded stages: each call of a convolution with the BatchNorm that follows it, the answers of the network."""

from __future__ import annotations

import copy
import gc
import linecache
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import Stage, images, lived_in
from odd_networks import (
    COMPUTED_WEIGHTS,
    ENGINES,
    SHAPE,
    ActivatedNorm,
    assert_answers_or_refusal,
    conv,
    layers,
    network,
)
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast import zoo
from eefast.planning.folding import fold_stage


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Halved(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight / 2, bias)


def replaced_forward() -> nn.Module:
    layer = conv()
    layer.forward = lambda x: F.conv2d(x, layer.weight, None, padding=1)  # type: ignore[method-assign]
    return nn.Sequential(layer, nn.BatchNorm2d(8))


def in_1d() -> nn.Module:
    inner = {"conv": nn.Conv1d(8, 8, 3, padding=1), "norm": nn.BatchNorm1d(8)}
    return Stage(lambda s, x: s.norm(s.conv(x.flatten(2))).unflatten(2, x.shape[2:]), **inner)


def in_3d() -> nn.Module:
    inner = {"conv": nn.Conv3d(8, 8, 3, padding=1), "norm": nn.BatchNorm3d(8)}
    return Stage(lambda s, x: s.norm(s.conv(x[:, :, None])).squeeze(2), **inner)


def without_scale() -> nn.Module:
    return nn.Sequential(conv(bias=False), nn.BatchNorm2d(8, eps=0.1, affine=False), nn.ReLU())


def functional(s: Any, x: Tensor) -> Tensor:
    return F.batch_norm(s.conv(x), s.norm.running_mean, s.norm.running_var, s.norm.weight, s.norm.bias)


def in_place(s: Any, x: Tensor) -> Tensor:
    y = s.conv(x)
    y.mul_(2)
    return s.norm(y)


STAGES: dict[str, Callable[[], nn.Module]] = {
    "one conv twice, a norm after one": lambda: Stage(lambda s, x: s.conv(x).relu() + s.norm(s.conv(x)), **layers()),
    "conv and norm twice": lambda: Stage(lambda s, x: s.norm(s.conv(s.norm(s.conv(x)).relu())), **layers()),
    "one conv, two norms": lambda: Stage(
        lambda s, x: s.b(s.conv(s.norm(s.conv(x)).relu())), **layers(b=nn.BatchNorm2d(8))
    ),
    "two convs, one norm": lambda: Stage(lambda s, x: s.norm(s.b(s.norm(s.conv(x)).relu())), **layers(b=conv())),
    "a conv with other readers": lambda: Stage(lambda s, x: (y := s.conv(x)) + s.norm(y), **layers()),
    "a norm read by two convs": lambda: Stage(lambda s, x: s.conv(y := s.norm(x)) + s.b(y), **layers(b=conv())),
    "a norm before its conv": lambda: nn.Sequential(nn.BatchNorm2d(8), conv(), nn.ReLU()),
    "functional norm": lambda: Stage(functional, **layers()),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)),
    "1d": in_1d,
    "3d": in_3d,
    "without scale": without_scale,
    "reflected": lambda: nn.Sequential(conv(padding_mode="reflect"), nn.BatchNorm2d(8)),
    "same padding": lambda: nn.Sequential(nn.Conv2d(8, 8, 2, padding="same"), nn.BatchNorm2d(8)),
    "grouped": lambda: nn.Sequential(conv(groups=4), nn.BatchNorm2d(8), nn.ReLU6()),
    "norm with activation": lambda: nn.Sequential(conv(), ActivatedNorm(8), conv()),
    "standardised": lambda: nn.Sequential(Standardised(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    "another conv inside": lambda: nn.Sequential(Halved(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
    "another forward": replaced_forward,
    "in place": lambda: Stage(in_place, **layers()),
    "dropout": lambda: nn.Sequential(conv(), nn.Dropout2d(), nn.BatchNorm2d(8), nn.Dropout(), nn.FeatureAlphaDropout()),
    "self.training": lambda: Stage(lambda s, x: s.conv(x * 5 if s.training else x), **layers()),
    "view": lambda: Stage(lambda s, x: s.norm(s.conv(x)).view(x.size(0), 2, -1).view_as(x).contiguous(), **layers()),
    **COMPUTED_WEIGHTS,
    "untraceable": lambda: Stage(lambda s, x: s.norm(s.conv(x)) if len(x) < 1e9 else x, **layers()),
    "a conv alone": conv,
    "a norm alone": lambda: nn.BatchNorm2d(8),
    "a closure": lambda: Stage(partial(lambda layer, s, x: layer(s.conv(x)), nn.ReLU()), **layers()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.sampled(16)
def test_odd_stages_are_answered_as_the_network_does(name):
    net, x = network(STAGES[name]()), images(5, SHAPE)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert assert_answers_or_refusal(net, x, "compact") == ""
    assert assert_answers_or_refusal(net, x, "resident") == "" or not name.startswith(("conv and", "one conv, two"))
    assert eefast.accelerate(net).plan.engine != "reference"
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stage_object_used_twice_is_right(engine):
    block = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    assert assert_answers_or_refusal(network(block, block), images(5, SHAPE), engine) == ""


@pytest.mark.parametrize("engine", ENGINES)
def test_modules_with_two_names_are_right(engine):
    stage = Stage(lambda s, x: s.norm(s.conv(s.norm2(s.conv2(x)))), **layers(conv2=conv(), norm2=nn.BatchNorm2d(8)))
    net, x = network(stage), images(5, SHAPE)
    stage.conv2, stage.norm2 = stage.conv, stage.norm
    assert assert_answers_or_refusal(net, x, engine) == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("engine", ["compact", "auto"])
def test_compiled_and_scripted_stages_run_as_they_were_written(engine):
    net = network(conv(), torch.compile(nn.Sequential(conv(), nn.BatchNorm2d(8)), backend="eager"))
    net.stages[1] = torch.jit.script(nn.Sequential(conv(), nn.BatchNorm2d(8)).eval())
    assert assert_answers_or_refusal(net, images(5, SHAPE), engine) == ""


@pytest.mark.parametrize("engine", ["compact", "auto"])
def test_stages_compiled_in_place_are_folded(engine):
    net = network(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    net.stages[1].compile(backend="eager")
    assert assert_answers_or_refusal(net, images(5, SHAPE), engine) == ""
    fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    assert [row.note for row in fast.plan.stages] == ["folded"] * 2


class Branching(nn.Module):
    """A stage that torch.fx cannot trace, since it looks at its data."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)

    def forward(self, x):
        return self.norm(self.conv(x)) if bool(x.sum() > -1e30) or not len(x) else x


def test_stages_that_cannot_be_traced_run_unchanged():
    stage, x = lived_in(Branching(), 2), images(33, (3, 16, 16))
    copied, what = fold_stage(stage, torch.float32)
    assert what == "not folded: torch.fx cannot trace it (TraceError)"
    torch.testing.assert_close(copied(x), stage(x))


@pytest.mark.parametrize("name", ["eenet8", "eenet18", "eenet20", "eenet50"])
def test_folding_errs_no_more_than_float32_does(name):
    net = lived_in(zoo.eenet(name, 2, "linear", input_shape=(3, 16, 16)), 5)
    x = images(3, (3, 16, 16))
    exact = copy.deepcopy(net).double().plain()(x.double())
    folded, what = fold_stage(net.plain(), torch.float32)
    assert what == "folded"
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left == (3 if name == "eenet8" else 0)  # EENet-8 has BatchNorms before its convolutions
    tolerance = 2 * (net.plain()(x) - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (folded(x) - exact).abs().max() <= tolerance


def test_plans_leave_no_sources():
    """torch.fx keeps the source of every graph module that it makes, unless it is told to forget it."""
    net = network(conv())
    for _ in range(3):
        fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    gc.collect()
    sources, lines = torch.fx.graph_module._loader.eval_cache, linecache.cache
    before = len(sources), len(lines)
    for _ in range(20):
        fast = eefast.accelerate(net, engine="compact", stages="pytorch")
    gc.collect()
    assert (len(sources), len(lines)) == before
    name = type(fast.engine.steps[0].stage).forward.__code__.co_filename
    assert name in sources
    del fast
    gc.collect()
    assert name not in sources
