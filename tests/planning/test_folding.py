"""Folding and planning of odd stages: an engine gives the network's answers, or says why it cannot."""

from __future__ import annotations

import gc
import linecache
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from networks import Stage, images
from odd_networks import ENGINES, SHAPE, ActivatedNorm, assert_answers_or_refusal, conv, network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import eefast
from eefast.planning import planner


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
    planner.log_once.cache_clear()


def layers(**more: nn.Module) -> dict[str, nn.Module]:
    return {"conv": conv(), "norm": nn.BatchNorm2d(8), **more}


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
    "weight_norm": lambda: nn.Sequential(weight_norm(conv()), nn.BatchNorm2d(8)),
    "spectral_norm": lambda: nn.Sequential(spectral_norm(conv()), nn.BatchNorm2d(8)),
    "pruned": lambda: nn.Sequential(prune.l1_unstructured(conv(), "weight", 0.5), nn.BatchNorm2d(8)),
    "parametrised": lambda: nn.Sequential(parametrizations.weight_norm(conv()), nn.BatchNorm2d(8)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(conv()), nn.BatchNorm2d(8)),
    "untraceable": lambda: Stage(lambda s, x: s.norm(s.conv(x)) if len(x) < 1e9 else x, **layers()),
    "a conv alone": conv,
    "a norm alone": lambda: nn.BatchNorm2d(8),
    "a closure": lambda: Stage(partial(lambda layer, s, x: layer(s.conv(x)), nn.ReLU()), **layers()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STAGES)
def test_odd_stages_are_answered_as_the_network_does(name):
    net, x = network(STAGES[name]()), images(5, SHAPE)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    assert assert_answers_or_refusal(net, x, "compact") == ""
    assert assert_answers_or_refusal(net, x, "resident") == "" or not name.startswith(("conv and", "one conv, two"))
    assert eefast.accelerate(net).plan.engine != "reference"
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "pruned", "parametrised", "conv and norm twice"])
def test_after_a_step_of_training_the_weights_are_the_current_ones(name):
    """Their weights are no leaves of autograd then, which `copy.deepcopy` refuses."""
    net, x = network(STAGES[name](), STAGES[name]()), images(5, SHAPE)
    fast = eefast.accelerate(net)
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    sum(out.logits.square().sum() for out in net.train()(x)).backward()
    optimiser.step()
    net.eval()
    with torch.no_grad():
        torch.testing.assert_close(fast(x).logits, net(x).logits, rtol=1e-4, atol=1e-4)
    sum(out.logits.square().sum() for out in net.all_exits(x)).backward()
    for engine in ENGINES:
        assert assert_answers_or_refusal(net, x, engine) == ""


def test_a_stage_object_used_twice_is_right():
    block = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
    net, x = network(block, block), images(5, SHAPE)
    for engine in ENGINES:
        assert assert_answers_or_refusal(net, x, engine) == ""


def test_modules_with_two_names_are_right():
    stage = Stage(lambda s, x: s.norm(s.conv(s.norm2(s.conv2(x)))), **layers(conv2=conv(), norm2=nn.BatchNorm2d(8)))
    net, x = network(stage), images(5, SHAPE)
    stage.conv2, stage.norm2 = stage.conv, stage.norm
    for engine in ENGINES:
        assert assert_answers_or_refusal(net, x, engine) == ""


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) * self.calls


def hooked(register: str) -> nn.Module:
    stage = nn.Sequential(conv(), nn.ReLU())
    hook = (lambda m, args: (args[0] * 2,)) if "pre" in register else (lambda m, args, out: out * 2)
    getattr(stage[0], register)(hook)
    return stage


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch statistics": (
        lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)),
        "stage 1 has BatchNorm2d '1' without running statistics, so that its answers depend on the whole batch",
    ),
    "functional batch statistics": (
        lambda: Stage(lambda s, x: F.batch_norm(s.conv(x), None, None, training=True), **layers()),
        "stage 1 answers differently for an image alone, so it depends on the whole batch",
    ),
    "mean of the batch": (
        lambda: Stage(lambda s, x: s.conv(x - x.mean(0)), **layers()),
        "stage 1 answers differently for an image alone, so it depends on the whole batch",
    ),
    "random": (
        lambda: Stage(lambda s, x: s.conv(F.dropout(x, 0.5, True)), **layers()),
        "stage 1 answers differently when it is called again",
    ),
    "stateful": (Counting, "stage 1 answers differently when it is called again"),
    "hook": (
        partial(hooked, "register_forward_hook"),
        "stage 1 has Conv2d '0' with a forward hook, which only the reference engine calls",
    ),
    "pre-hook": (partial(hooked, "register_forward_pre_hook"), "stage 1 has Conv2d '0' with a forward hook"),
    "no view": (
        lambda: nn.Sequential(Stage(lambda s, x: s.conv(x).view(len(x), -1).view_as(x), **layers())),
        "stage 1: on channels-last maps in float32 its copy in '0': RuntimeError: view size is not compatible",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_stages_that_only_the_reference_engine_answers(name, caplog):
    make, reason = REFUSED[name]
    net, x = network(make()), images(5, SHAPE)
    for engine in ("compact", "resident"):
        with pytest.raises(ValueError, match=f"^engine='{engine}' cannot run: .*; use engine='"):
            eefast.accelerate(net, engine=engine)
    assert reason in assert_answers_or_refusal(net, x, "compact")
    with caplog.at_level(logging.WARNING, "eefast"):
        for _ in range(2):
            fast = eefast.accelerate(net)
    assert [r.message for r in caplog.records if reason in r.message] == [caplog.records[-1].message]
    assert fast.plan.engine == "reference"
    if name not in ("random", "stateful"):
        with torch.no_grad():
            torch.testing.assert_close(fast(x).logits, net(x).logits)


def test_an_exception_in_the_stage_itself_names_its_module(caplog):
    """The constant meets another dtype; the reference engine then says so at the call, as the network does."""
    inner = Stage(lambda s, x: F.conv2d(x, s.conv.weight.bfloat16()), conv=nn.Conv2d(8, 8, 1))
    net = network(nn.Sequential(nn.ReLU(), inner))
    said = "(Input type|expected scalar type)"  # by which of PyTorch's convolutions is tried first
    with pytest.raises(ValueError, match=rf"cannot run: stage 1 in '1': RuntimeError: {said}"):
        eefast.accelerate(net, engine="compact")
    fast = eefast.accelerate(net)
    with pytest.raises(RuntimeError, match=said):
        fast(images(2, SHAPE))


@pytest.mark.parametrize("engine", ["auto", "compact", "reference", "resident"])
def test_another_number_of_classes_is_refused_with_the_way_out(engine):
    net, x = network(conv()), images(5, SHAPE)
    fast = eefast.accelerate(net, engine=engine)
    for head in net.heads:
        head.classifier = nn.Linear(8, 100)
    message = r"the head of exit 0 answers with 100 classes, the network was built for 5; .*with_criterion"
    for call in (lambda: eefast.accelerate(net, engine=engine), lambda: fast(x), lambda: net(x)):
        with pytest.raises(ValueError, match=message):
            call()
    rebuilt = net.with_criterion(net.criterion.name, [1.0])
    assert eefast.accelerate(rebuilt, engine=engine)(x).logits.shape == (5, 100)


def test_a_part_left_in_training_mode_is_refused():
    net, x = network(conv()), images(5, SHAPE)
    net.heads[1].classifier = nn.Sequential(nn.Dropout(), nn.Linear(8, 5))
    for engine in ENGINES:
        with pytest.raises(ValueError, match=r"exit 1 has parts in training mode .*\(Dropout, Linear, Seq"):
            eefast.accelerate(net, engine=engine)
    net.eval()
    assert assert_answers_or_refusal(net, x, "auto") == ""
    net.stages[1] = conv()  # in training mode too, but it answers the same
    assert assert_answers_or_refusal(net, x, "compact") == "" or "Dropout" in repr(net)


def test_weights_that_are_no_numbers_run_as_the_reference_does():
    net, x = network(conv()), images(5, SHAPE)
    net.thresholds.fill_(0.0)
    with torch.no_grad():
        net.stages[1].weight[0] = torch.nan
    for engine in ENGINES:
        fast = eefast.accelerate(net, engine=engine)
        torch.testing.assert_close(fast(x).logits, net(x).logits, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_compiled_and_scripted_stages_run_as_they_were_written():
    compiled, x = torch.compile(nn.Sequential(conv(), nn.BatchNorm2d(8)), backend="eager"), images(5, SHAPE)
    scripted = network(conv(), compiled)
    scripted.stages[1] = torch.jit.script(nn.Sequential(conv(), nn.BatchNorm2d(8)).eval())
    in_place = network(nn.Sequential(conv(), nn.BatchNorm2d(8)))
    in_place.stages[1].compile(backend="eager")
    for net in (scripted, in_place):
        assert assert_answers_or_refusal(net, x, "compact") == ""
        assert assert_answers_or_refusal(net, x, "auto") == ""
    assert [row.note for row in eefast.accelerate(in_place, engine="compact").plan.stages] == ["folded"] * 2


def test_planning_under_inference_mode_serves_calls_outside_of_it():
    net, x = network(conv()), images(5, SHAPE)
    with torch.inference_mode():
        fast = eefast.accelerate(net, engine="compact")
    assert not any(t.is_inference() for step in fast.engine.steps for t in step.stage.parameters())
    torch.testing.assert_close(fast(x).logits, net(x).logits, rtol=1e-4, atol=1e-4)


def test_plans_leave_no_sources():
    """torch.fx keeps the source of every graph module that it makes, unless it is told to forget it."""
    net = network(conv())
    for _ in range(3):
        fast = eefast.accelerate(net, engine="compact")
    gc.collect()
    sources, lines = torch.fx.graph_module._loader.eval_cache, linecache.cache
    before = len(sources), len(lines)
    for _ in range(20):
        fast = eefast.accelerate(net, engine="compact")
    gc.collect()
    assert (len(sources), len(lines)) == before
    name = type(fast.engine.steps[0].stage).forward.__code__.co_filename
    assert name in sources
    del fast
    gc.collect()
    assert name not in sources
