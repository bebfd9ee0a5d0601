"""What nodes of a graph compute: every spelling of additions and ReLUs; in place where a call changes its input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fused_stages import ADDITIONS, RELUS, conv, features
from networks import Stage
from torch import Tensor, fx, nn
from torch.nn import functional as F

from eefast.modules.tracing import Tracer, attributes, graph_module
from eefast.planning.patterns import called, computes_as, describe, is_addition, is_identity, is_relu, writes_in_place

OTHERS: dict[str, Callable[[Stage, Tensor], Tensor]] = {
    "a product": lambda s, x: x * 2,
    "a product in place": lambda s, x: x.mul_(2),
    "a difference in place": lambda s, x: x.__isub__(1),
    "a result in another tensor": lambda s, x: torch.mul(x, 2, out=x),
    "an activation": lambda s, x: F.hardtanh(x),
    "an activation in place": lambda s, x: F.hardtanh(x, inplace=True),
    "a module in place": lambda s, x: s.other(x),
}
CALLS = {
    **{f"ReLU: {name}": run for name, run in RELUS.items()},
    **{f"addition: {name}": lambda s, x, run=run: run(x, x) for name, run in ADDITIONS.items()},
    **OTHERS,
}


def last_call(stage: nn.Module) -> tuple[fx.GraphModule, fx.Node]:
    graph = Tracer().trace(stage)
    module = graph_module(attributes(stage, graph), graph)
    return module, [node for node in module.graph.nodes if node.op.startswith("call")][-1]


@pytest.mark.parametrize("name", CALLS)
def test_spellings(name: str) -> None:
    stage = Stage(CALLS[name], relu=nn.ReLU(), relu_in_place=nn.ReLU(inplace=True), other=nn.SiLU(inplace=True))
    module, node = last_call(stage)
    found = called(module, node)
    assert is_relu(found) == name.startswith("ReLU")
    assert is_addition(found) == name.startswith("addition")
    assert not is_identity(found)
    x = features(2, 3, 4, 5)
    before = x.clone()
    stage(x)
    assert writes_in_place(module, node) == (not torch.equal(x, before))


def changed(module: nn.Module, change: Callable[[nn.Module], object]) -> nn.Module:
    change(module)
    return module


class Renamed(nn.Dropout):
    pass


class Halving(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Identity(), True),
        (nn.Dropout(), True),
        (nn.Dropout2d(), True),
        (Renamed(), True),
        (Halving(), False),
        (nn.SiLU(), False),
        (changed(nn.Identity(), lambda m: setattr(m, "forward", lambda x: -x)), False),
        (changed(nn.Dropout(), lambda m: m.register_forward_hook(lambda m, x, y: -y)), False),
        (changed(nn.Dropout(), lambda m: m.register_forward_pre_hook(lambda m, x: (-x[0],))), False),
    ],
)
def test_what_is_an_identity(module: nn.Module, expected: bool) -> None:
    assert is_identity(module) == expected
    assert computes_as(module, nn.Identity, nn.Dropout, nn.Dropout2d) == expected
    x = features(2, 3, 4, 4)
    assert torch.equal(module.eval()(x), x) == expected


@pytest.mark.parametrize(
    ("run", "words"),
    [(lambda s, x: s.a(x), "Conv2d(3, 3"), (lambda s, x: F.gelu(x), "gelu"), (lambda s, x: x.sum(), "sum")],
)
def test_what_errors_call_a_node(run: Callable[[Stage, Tensor], Tensor], words: str) -> None:
    assert describe(*last_call(Stage(run, a=conv()))).startswith(words)


def test_what_errors_call_a_parameter() -> None:
    module, _ = last_call(Stage(lambda s, x: x * s.a.weight, a=conv()))
    (weight,) = module.graph.find_nodes(op="get_attr")
    assert called(module, weight) is None
    assert describe(module, weight) == "a.weight"
