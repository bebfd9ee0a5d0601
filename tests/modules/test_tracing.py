"""Tracing: torch.fx's graphs, without a change of what other threads or the module's owner see."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torchvision
from networks import images, lived_in
from torch import Tensor, fx, nn
from torch.nn import functional as F

import eefast
from eefast.heads import ExitHead
from eefast.modules.tracing import InPlaceProxy, Tracer, attributes


@fx.wrap
def leaf(x: Tensor, factor: float) -> Tensor:
    return x * factor if x.shape[0] else x


def helper(x: Tensor) -> Tensor:
    return leaf(x, factor=0.5)


class Wrapped(nn.Module):
    """Calls a wrapped function through another one, and `math` on a size."""

    def forward(self, x: Tensor) -> Tensor:
        return helper(x) / math.sqrt(x.shape[1])


class Standardised(nn.Conv2d):
    """Computes with its parameters before any proxy is there, as weight-standardised convolutions do."""

    __module__ = "elsewhere"

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Held(nn.Module):
    """Calls modules through a list, a bound method, a partial, a closure and an attribute set while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1) for _ in range(5)])
        self.listed, self.bound = [self.convs[0]], self.convs[1].forward
        self.part, self.closed = partial(self.through, self.convs[2]), lambda x: self.convs[3](x)
        self.lock = threading.Lock()

    def through(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x)

    def forward(self, x: Tensor) -> Tensor:
        self.last = x = self.closed(self.part(self.listed[0](x)))
        return self.convs[4:][0](self.last) if type(self.convs[4]) is nn.Conv2d else x


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Conv2d(3, 3, 1)
        self.scale = nn.Parameter(torch.rand(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.scale + self.first.bias.view(3, 1, 1)


def graph_of(tracer: fx.Tracer, module: nn.Module) -> list[tuple[str, ...]]:
    return [(n.op, str(n.target), str(n.args), str(n.kwargs), n.name) for n in tracer.trace(module).nodes]


class TorchTracer(fx.Tracer):
    """torch.fx's tracer, which patches the process."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return InPlaceProxy(node, self)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "mobilenet_v3_small": torchvision.models.mobilenet_v3_small,
    "densenet": partial(torchvision.models.DenseNet, 8, (2, 2), 8),
    "googlenet": partial(torchvision.models.googlenet, init_weights=False, aux_logits=False),
    "convnext": partial(torchvision.models.ConvNeXt, [torchvision.models.convnext.CNBlockConfig(8, None, 2)], 0.3),
    "swin": partial(torchvision.models.SwinTransformer, [4, 4], 16, [1, 1], [1, 2], [2, 2]),
    "wrapped": lambda: nn.Sequential(Wrapped()),
    "standardised": lambda: nn.Sequential(Standardised(3, 3, 1)),
    "shared": Shared,
    "eenet20": lambda: nn.Sequential(*eefast.zoo.eenet("eenet20", num_exits=2).stages),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.sampled(8)
def test_graphs_are_those_of_torch_fx(name, training):
    module = MODULES[name]().train(training)
    before = {name: dict(vars(m)) for name, m in module.named_modules()}
    got = graph_of(Tracer(), module)
    assert {name: dict(vars(m)) for name, m in module.named_modules()} == before
    assert got == graph_of(TorchTracer(), module)


def test_modules_are_found_wherever_they_are_held():
    module, x = Held(), images(2, (3, 5, 7))
    graph = Tracer().trace(module)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == [f"convs.{i}" for i in (0, 2, 3, 4)]
    assert not hasattr(module, "last")  # what the trace set, it set on the copy
    torch.testing.assert_close(fx.GraphModule(attributes(module, graph), graph)(x), module(x))


def test_constants_of_the_code_stay_off_the_module():
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)

    module, x = Constant(), images(2, (3, 4, 4))
    graph = Tracer().trace(module)
    assert not [name for name in vars(module) if "constant" in name]
    torch.testing.assert_close(fx.GraphModule(attributes(module, graph), graph)(x), module(x))


def test_a_forward_that_the_user_replaced_is_what_gets_traced():
    plain, x = Shared(), images(2, (3, 4, 4))
    for forward in (lambda x: plain.first(x) * 3, partial(Shared.forward, plain).func.__get__(plain)):
        plain.forward = forward
        graph = Tracer().trace(plain)
        torch.testing.assert_close(fx.GraphModule(attributes(plain, graph), graph)(x), plain(x))
    plain.forward = partial(Shared.forward, plain)
    with pytest.raises(TypeError, match="forward of the Shared is a partial, which cannot be traced"):
        Tracer().trace(plain)
    assert len(Tracer().trace(nn.Sequential(plain)).nodes) == len(Tracer().trace(Shared()).nodes)


def test_threads_that_run_and_plan_at_once_do_not_notice_one_another():
    """A bystander's plain module, the same network in use, compiled flags and four planners, all with right answers."""
    stages = [nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Wrapped()) for _ in "a"]
    net = eefast.EarlyExitNet(stages, [ExitHead("pool", (8, 6, 6), 3, (3, 6, 6))], input_shape=(3, 6, 6)).eval()
    lived_in(net, 1)
    bystander, x, line = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), images(4, (3, 6, 6)), torch.ones(1, 8)
    original = nn.Module.__call__, nn.Module.__getattr__, math.sqrt, leaf
    with torch.no_grad():
        wanted, plain = net(x).logits, bystander(line)
    errors: list[BaseException] = []
    planned, done = [], threading.Event()

    def watch() -> None:
        try:
            while not done.is_set():
                with torch.no_grad():
                    assert torch.equal(bystander(line), plain)
                    assert torch.equal(net(x).logits, wanted)
                assert (nn.Module.__call__, nn.Module.__getattr__, math.sqrt, leaf) == original
        except BaseException as error:  # whatever it is, the test names it
            errors.append(error)

    def plan() -> None:
        try:
            for _ in range(6):
                fast = eefast.accelerate(net, engine="compact", stages="pytorch")
                torch.testing.assert_close(fast(x).logits, wanted, rtol=1e-4, atol=1e-4)
                planned.append(fast.plan.stages[0].note)
        except BaseException as error:
            errors.append(error)

    watchers = [threading.Thread(target=watch) for _ in range(2)]
    planners = [threading.Thread(target=plan) for _ in range(4)]
    for thread in watchers + planners:
        thread.start()
    for thread in planners:
        thread.join(60)
    done.set()
    for thread in watchers:
        thread.join(60)
    assert not errors
    assert planned == ["folded"] * 24
