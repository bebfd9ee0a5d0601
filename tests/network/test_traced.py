"""A network that answers image by image cannot be traced by example: it says so, and what to take instead."""

import pytest
import torch
from networks import assert_same_answers, images, lived_in, one_by_one, spread_thresholds
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import eefast
from eefast import zoo

SHAPE = (3, 8, 8)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x * 2.0).logits + 1


class AllExits(nn.Module):
    """What the message proposes for every exit's answer."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return [out.logits for out in self.net.all_exits(x)]


@pytest.fixture(scope="module")
def net():
    made = lived_in(zoo.eenet("eenet8", input_shape=SHAPE), 1)
    spread_thresholds(made, images(33, SHAPE), 0.4)
    return made


@pytest.fixture
def x():
    return images(5, SHAPE)


WAYS = {
    "jit.trace": lambda m, x: torch.jit.trace(m, x),
    "jit.script": lambda m, x: torch.jit.script(m),
    "export": lambda m, x: torch.export.export(m, (x,), strict=False),
    "export, strict": lambda m, x: torch.export.export(m, (x,), strict=True),
    "fx": lambda m, x: torch.fx.symbolic_trace(m),
    "make_fx": lambda m, x: make_fx(m)(x),
    "make_fx, fake": lambda m, x: make_fx(m, tracing_mode="fake")(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("what", ["net", "compact", "resident", "compact, inside"])
@pytest.mark.parametrize("way", WAYS)
def test_tracing_says_what_to_take_instead(net, x, way, what):
    traced = net if what == "net" else eefast.accelerate(net, engine=what.split(",")[0])
    traced = Around(traced) if "inside" in what else traced
    with pytest.raises(Exception, match=r"cannot be traced; take net\.plain\(\)") as caught:
        WAYS[way](traced, x)
    assert way == "export, strict" or type(caught.value) is RuntimeError
    with torch.no_grad():
        assert_same_answers(net(x), one_by_one(net, x), net)  # and no state is left


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("proposed", [eefast.EarlyExitNet.plain, AllExits], ids=["plain", "all exits"])
@torch.no_grad()
def test_what_the_message_proposes_can_be_traced(net, x, proposed):
    module, other = proposed(net), images(3, SHAPE, 7)
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x), module(x))
    torch.testing.assert_close(traced(other), module(other))
    torch.testing.assert_close(make_fx(module)(x)(x), module(x))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


@pytest.mark.parametrize("engine", ["none", "reference", "compact", "resident"])
def test_torch_compile_goes_on_working(net, x, engine):
    module = Around(net if engine == "none" else eefast.accelerate(net, engine=engine))
    compiled = torch.compile(module, backend="eager")
    with torch.no_grad():
        for images_ in (x, images(3, SHAPE, 7)):
            torch.testing.assert_close(compiled(images_), module(images_))


@pytest.mark.parametrize("engine", ["reference", "compact", "resident"])
def test_code_around_it_compiles_once_for_all_batch_sizes(net, engine):
    """With the first size as a constant, with the second one as a symbol, and never again."""
    torch._dynamo.reset()
    fast, compiled = eefast.accelerate(net, engine=engine), []

    def counting(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    around = torch.compile(Around(fast), backend=counting)
    counts = []
    with torch.no_grad():
        for n in (3, 5, 7, 31):
            x = images(n, SHAPE, n)
            torch.testing.assert_close(around(x), fast(x * 2.0).logits + 1)
            counts.append(len(compiled))
    # Before and after the call of the network.
    assert counts == [2, 4, 4, 4]


def test_in_training_mode_a_network_compiles_as_one_graph(x):
    net = zoo.eenet("eenet8", input_shape=SHAPE, normalization=((0.5,) * 3, (0.2,) * 3)).train()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert [out.logits.shape for out in compiled(x)] == [(5, 10)] * 3
