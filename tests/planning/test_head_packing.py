"""Changed exit heads: an engine gives the network's answers, or names the part of the head that it cannot pack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Stage, images
from odd_networks import ENGINES, SHAPE, ActivatedNorm, assert_answers_or_refusal, conv, network, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm

import eefast
from eefast.heads import ExitHead


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class DoubledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class CastLinear(nn.Linear):
    """As timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def change_forward(head: ExitHead) -> None:
    head.forward = lambda x: ExitHead.forward(head, 2 * x)  # type: ignore[method-assign]


def set_parts(**parts: Callable[[], nn.Module]) -> Callable[[ExitHead], None]:
    def change(head: ExitHead) -> None:
        for name, make in parts.items():
            setattr(head, name, make().eval())

    return change


def set_attribute(path: str, value: Any) -> Callable[[ExitHead], None]:
    def change(head: ExitHead) -> None:
        *parents, name = path.split(".")
        owner: Any = head
        for parent in parents:
            owner = getattr(owner, parent)
        setattr(owner, name, value)

    return change


# kind of the head, the change, and why engines refuse it ("" where they run it).
HEADS: dict[str, tuple[str, Callable[[ExitHead], Any], str]] = {
    "max pooling": ("pool", set_parts(pool=lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())), "as pool"),
    "one window": ("pool", set_parts(pool=lambda: nn.Sequential(nn.AvgPool2d(SHAPE[1:]), nn.Flatten())), "as pool"),
    "mean and maximum": (
        "pool",
        set_parts(pool=lambda: Stage(lambda s, x: x.mean((2, 3)) + x.amax((2, 3)))),
        "the head of exit 0 has Stage() as pool",
    ),
    "the mean in other words": ("pool", set_parts(pool=lambda: Stage(lambda s, x: x.flatten(2).mean(2))), ""),
    "four means": ("pool", set_attribute("pool.0.output_size", 2), "as pool"),
    "flattened": ("pool", set_parts(pool=nn.Flatten), "the head of exit 0 has Flatten("),
    "pooled after all": (
        "plain",
        set_parts(pool=lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())),
        "as pool, not what head='plain' has",
    ),
    "a part of the map": ("plain", set_parts(pool=lambda: nn.Flatten(2)), "as pool"),
    "kind": ("pool", set_attribute("kind", "plain"), "as pool"),
    "instance norm": ("bnpool", set_parts(norm=lambda: nn.InstanceNorm2d(8)), "as norm"),
    "group norm": ("pool", set_parts(norm=lambda: nn.GroupNorm(4, 8)), "the head of exit 0 has GroupNorm(4, 8"),
    "ReLU6": ("pool", set_parts(norm=nn.ReLU6), "the head of exit 0 has ReLU6() as norm"),
    "activated norm": ("bnpool", set_parts(norm=lambda: ActivatedNorm(8)), "as norm"),
    "a norm more": ("pool", set_parts(norm=lambda: nn.BatchNorm2d(8, eps=0.3)), ""),
    "a norm more, flattened": ("plain", set_parts(norm=lambda: randomised(nn.BatchNorm2d(8))), ""),
    "a norm without scale": ("conv1", set_parts(norm=lambda: randomised(nn.BatchNorm2d(8, affine=False))), ""),
    "a norm of the batch": ("bnpool", set_parts(norm=lambda: nn.BatchNorm2d(8, track_running_stats=False)), "without"),
    "eps": ("bnpool", set_attribute("norm.eps", 0.7), ""),
    "no norm": ("bnpool", set_parts(norm=nn.Identity), ""),
    "wider conv": ("conv1", set_parts(convs=lambda: nn.Sequential(nn.Conv2d(8, 8, 5, padding=2), nn.SiLU())), ""),
    "dilated conv": ("conv2", set_attribute("convs.1.0.dilation", (2, 2)), ""),
    "other activation": ("conv1", set_attribute("convs.0.2", nn.Hardswish().eval()), ""),
    "strided conv": ("conv2", set_attribute("convs.0.0.stride", (2, 2)), ""),
    "a conv in a pool head": ("pool", set_parts(convs=lambda: nn.Sequential(conv())), ""),
    "a conv for all": ("pool", set_parts(convs=conv), "the head of exit 0 has Conv2d(8, 8"),
    "no bias": ("pool", set_parts(classifier=lambda: nn.Linear(8, 5, bias=False)), ""),
    "no bias of the confidence": ("plain", set_parts(confidence=lambda: nn.Linear(8 * 9 * 7, 1, bias=False)), ""),
    "doubled": ("pool", set_parts(classifier=lambda: DoubledLinear(8, 5)), "has DoubledLinear(in_features=8"),
    "a linear in other words": ("pool", set_parts(classifier=lambda: CastLinear(8, 5)), ""),
    "doubled confidence": ("pool", set_parts(confidence=lambda: DoubledLinear(8, 1)), "as confidence, not nn.Linear"),
    "two layers": ("pool", set_parts(classifier=lambda: nn.Sequential(nn.Dropout(), nn.Linear(8, 5))), "as classifier"),
    "normalised": ("pool", lambda head: weight_norm(head.classifier), ""),
    "parametrised": ("pool", lambda head: parametrizations.weight_norm(head.classifier), ""),
    "pruned": ("pool", lambda head: prune.l1_unstructured(head.classifier, "weight", 0.5), ""),
    "tied": ("pool", lambda head: setattr(head.confidence, "weight", nn.Parameter(head.classifier.weight[:1])), ""),
    "forward": ("pool", change_forward, "the head of exit 0 has another forward or hooks"),
    "hook": (
        "pool",
        lambda head: head.register_forward_hook(lambda m, args, out: out),
        "the head of exit 0, ExitHead, with a forward hook",
    ),
    "hook inside": (
        "bnpool",
        lambda head: head.pool[0].register_forward_hook(lambda m, args, out: out * 3),
        "the head of exit 0 has AdaptiveAvgPool2d 'pool.0' with a forward hook",
    ),
    "convs where none were": ("pool", lambda head: head.convs.append(nn.Conv2d(8, 8, 1)), None),
    "pre-hook inside": (
        "pool",
        lambda head: head.norm.register_forward_pre_hook(lambda m, args: (args[0] * 3,)),
        "the head of exit 0 has Identity 'norm' with a forward hook",
    ),
}  # fmt: skip


# The network itself cannot run with these.
BROKEN = ("four means", "flattened", "pooled after all", "a part of the map")


def changed(name: str) -> tuple[Any, str | None]:
    """A network all of whose samples exit at the changed head, and why engines refuse it."""
    kind, change, reason = HEADS[name]
    net = network(conv(), head=kind)
    change(net.heads[0])
    net.thresholds.fill_(0.0)
    return net, reason


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.sampled(40)
def test_changed_heads(name, engine):
    (net, reason), x = changed(name), images(5, SHAPE)
    if engine == "auto" and reason:
        assert eefast.accelerate(net).plan.engine == "reference"
    if engine == "auto" and name in BROKEN:
        return
    refused = assert_answers_or_refusal(net, x, engine)
    if reason or engine == "compact":
        assert (reason in refused) if reason and engine != "auto" else not refused


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_heads_that_the_network_cannot_run_either(name, accelerated):
    net, _ = changed(name)
    run = eefast.accelerate(net) if accelerated else net
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run(images(5, SHAPE))


CHANGED_LATER = [
    "max pooling",
    "the mean in other words",
    "a norm more",
    "wider conv",
    "no bias",
    "hook inside",
    "convs where none were",
]


@pytest.mark.parametrize("name", CHANGED_LATER)
def test_heads_changed_after_planning_are_noticed(name):
    kind, change, reason = HEADS[name]
    net, x = network(conv(), head=kind), images(5, SHAPE)
    net.thresholds.fill_(0.0)
    fast, before = eefast.accelerate(net), net(x)
    change(net.heads[0])
    with torch.no_grad():
        wanted = net(x)
        assert (name == "the mean in other words") == torch.allclose(wanted.logits, before.logits)
        torch.testing.assert_close(fast(x).logits, wanted.logits, rtol=1e-4, atol=1e-4)
    assert (fast.plan.engine == "reference") == bool(reason)


class LouderHead(ExitHead):
    def forward(self, features):
        return super().forward(2 * features)


def test_a_subclassed_head_is_not_packed_as_if_it_were_the_original():
    net, x = network(conv()), images(5, SHAPE)
    net.heads[0] = randomised(LouderHead("pool", net.stage_costs[0].feature_shape, 5, net.input_shape))
    net.thresholds.fill_(0.0)  # all exit at the head that was changed
    with pytest.raises(ValueError, match="the head of exit 0 is a LouderHead"):
        eefast.accelerate(net, engine="compact")
    assert assert_answers_or_refusal(net, x, "auto") == ""
