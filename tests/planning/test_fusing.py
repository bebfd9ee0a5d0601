"""Fused convolutions: the unfused stage's answers for networks, spellings and random programs; which way is fastest."""

from __future__ import annotations

import operator
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from networks import Stage, images, lived_in
from torch import Tensor, fx, nn
from torch.nn import functional as F

from eefast import ops, zoo
from eefast.planning import fusing
from eefast.planning.folding import fold_stage
from eefast.planning.fusing import FusedConv, device_counted, fastest_stage, fuse_convolutions, indexed_stage
from eefast.zoo.resnet import trunk

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def seeded_without_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def conv(inputs: int = 3, outputs: int = 3, kernel: int = 3, stride: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, **{"padding": kernel // 2, **more})


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def folded_and_fused(stage: nn.Module, dtype: torch.dtype = DOUBLE) -> tuple[nn.Module, fx.GraphModule, int, int]:
    folded, what = fold_stage(nn.Sequential(lived_in(stage, 1)), dtype)
    assert what == "folded"
    fused, count, total = fuse_convolutions(folded)
    assert isinstance(fused, fx.GraphModule)
    return folded, fused, count, total


def kinds(module: fx.GraphModule) -> Counter[str]:
    """What the nodes of a graph call, inputs and outputs left out."""
    return Counter(
        type(module.get_submodule(node.target)).__name__ if node.op == "call_module" else str(node.target)
        for node in module.graph.nodes
        if node.op not in ("placeholder", "output")
    )


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


BLOCKS = {
    "eenet20": ("eenet20", (3, 13, 9)),
    "eenet18": ("eenet18", (3, 33, 40)),
    "eenet50": ("eenet50", (1, 33, 33)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_stages_of_the_zoo(name: str) -> None:
    """Nothing but fused convolutions and the stem's pooling is left, with the same features."""
    depth, shape = BLOCKS[name]
    net = zoo.eenet(depth, 2, "fine", "pool", num_classes=7, input_shape=shape)
    x = images(3, shape).double()
    for stage in net.stages:
        folded, fused, count, total = folded_and_fused(stage)
        assert count == total > 0
        assert kinds(fused) - Counter(MaxPool2d=1) == Counter(FusedConv=total)
        expected = folded(x)
        same(fused(x), expected)
        x = expected


@pytest.mark.parametrize("kind", ["resnet18", "resnet50"])
def test_layers_of_torchvision(kind: str) -> None:
    """Which write `out += identity`."""
    net = getattr(torchvision.models, kind)(weights=None)
    for layer, channels in (("layer1", 64), ("layer2", 64 if kind == "resnet18" else 256)):
        folded, fused, count, total = folded_and_fused(getattr(net, layer))
        assert count == total
        assert kinds(fused) == Counter(FusedConv=total)
        x = features(2, channels, 5, 7)
        same(fused(x), folded(x))


def test_the_folded_stage_stays_and_shares_its_weights() -> None:
    folded, fused, _, _ = folded_and_fused(zoo.eenet("eenet20", 1).stages[0])
    before = kinds(folded)
    x = images(1, (3, 8, 8)).double()
    expected = folded(x)
    fuse_convolutions(folded)
    assert kinds(folded) == before
    assert "FusedConv" not in before
    same(folded(x), expected)
    shared = {p.data_ptr() for p in folded.parameters()}
    weights = [p for p in fused.parameters() if p.dim() == 4]
    assert weights
    assert all(p.data_ptr() in shared for p in weights)
    same(pickle.loads(pickle.dumps(fused))(x), expected)


RELUS = {
    "module": lambda s, x: s.relu(x),
    "module in place": lambda s, x: s.relu_in_place(x),
    "functional": lambda s, x: F.relu(x),
    "functional in place": lambda s, x: F.relu(x, inplace=True),
    "functional in place, by position": lambda s, x: F.relu(x, True),
    "function": lambda s, x: torch.relu(x),
    "function in place": lambda s, x: torch.relu_(x),
    "method": lambda s, x: x.relu(),
    "method in place": lambda s, x: x.relu_(),
}
ADDITIONS = {
    "operator": lambda a, b: a + b,
    "operator in place": operator.iadd,
    "function": torch.add,
    "function with alpha": lambda a, b: torch.add(a, b, alpha=1),
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
}


def spelled(relu: str, run: Callable[..., Tensor]) -> Stage:
    layers = {"a": conv(), "b": conv(bias=False), "c": conv(kernel=1), "drop": nn.Dropout(0.5), "same": nn.Identity()}
    return Stage(
        lambda s, x: run(s, x, lambda value: RELUS[relu](s, value)),
        **layers, relu=nn.ReLU(), relu_in_place=nn.ReLU(inplace=True),
    )  # fmt: skip


@pytest.mark.parametrize("relu", RELUS)
def test_spellings_of_relu(relu: str) -> None:
    folded, fused, count, total = folded_and_fused(spelled(relu, lambda s, x, act: act(s.same(s.drop(s.a(x))))))
    assert (count, total, kinds(fused)) == (1, 1, Counter(FusedConv=1))
    x = features(2, 3, 5, 4)
    same(fused(x), folded(x))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("addition", ADDITIONS)
def test_spellings_of_addition(addition: str, swapped: bool) -> None:
    """With a map that others read too; what changes that in place is left alone."""
    add = ADDITIONS[addition]
    stage = spelled("module", lambda s, x, act: act(add(x, s.a(x)) if swapped else add(s.a(x), x)))
    folded, fused, count, _ = folded_and_fused(stage)
    changes_the_input = swapped and "in place" in addition
    assert count == (not changes_the_input)
    assert kinds(fused)["FusedConv"] == 1
    assert (kinds(fused) == Counter(FusedConv=1)) == (not changes_the_input)
    x = features(2, 3, 5, 4)
    seen = x.clone(), x.clone()
    same(fused(seen[0]), folded(seen[1]))
    same(*seen)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("addition", ADDITIONS)
def test_two_convolutions_that_are_added(addition: str, swapped: bool) -> None:
    """The one that runs last takes the other one's result and bias."""
    add = ADDITIONS[addition]

    def run(s: Stage, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        first, second = s.c(x), s.a(x)
        return act(add(second, first) if swapped else add(first, second))

    folded, fused, count, total = folded_and_fused(spelled("function", run))
    assert (count, total, kinds(fused)) == (2, 2, Counter(FusedConv=2))
    first, last = fused.graph.find_nodes(op="call_module")
    assert last.args[1] is first
    assert not fused.get_submodule(first.target).relu
    assert fused.get_submodule(first.target).bias is None
    assert fused.get_submodule(last.target).relu
    x = features(2, 3, 5, 4)
    same(fused(x), folded(x))


def through(run: Callable[..., Tensor]) -> Stage:
    return spelled("module", run)


def changed_between(s: Stage, x: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    y = x * 2
    z = s.a(y)
    y.mul_(3)
    return act(z) + y


LEFT = {
    "a multiple is added": (through(lambda s, x, act: act(torch.add(s.a(x), x, alpha=2))), 1),
    "a number is added": (through(lambda s, x, act: act(s.a(x) + 1)), 1),
    "added to itself": (through(lambda s, x, act: act((y := s.a(x)) + y)), 1),
    "read twice": (through(lambda s, x, act: act(y := s.a(x)) * y), 1),
    "the sum is read twice": (through(lambda s, x, act: act(y := s.a(x) + x) * y), 1),
    "its own input is added": (through(lambda s, x, act: act(s.b(y := s.a(x)) + y)), 2),
    "the input changes in between": (through(changed_between), 1),
    "another activation": (nn.Sequential(conv(), nn.SiLU()), 1),
    "other padding": (nn.Sequential(conv(padding_mode="reflect"), nn.ReLU()), 0),
    "padding in words": (nn.Sequential(conv(padding="same"), nn.ReLU()), 0),
    "grouped, dilated, transposed": (
        nn.Sequential(conv(3, 6, groups=3, dilation=2), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2), nn.ReLU()), 1
    ),
    "called twice": (through(lambda s, x, act: act(s.a(act(s.a(x)) + x))), 2),
    "functional": (Stage(lambda s, x: F.conv2d(x, s.a.weight).relu(), a=conv()), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left(name: str) -> None:
    stage, fused_convs = LEFT[name]
    folded, fused, _, _ = folded_and_fused(stage)
    assert kinds(fused)["FusedConv"] == fused_convs
    x = features(2, 3, 5, 6)
    seen = x.clone(), x.clone()
    same(fused(seen[0]), folded(seen[1]))
    same(*seen)


def test_what_counts_as_fused() -> None:
    counts = {name: folded_and_fused(stage)[2:] for name, (stage, _) in LEFT.items()}
    assert counts["another activation"] == (0, 1)
    assert counts["other padding"] == counts["padding in words"] == counts["functional"] == (0, 1)
    assert counts["its own input is added"] == (2, 2)
    assert counts["called twice"] == (2, 2)


@pytest.mark.parametrize("relu", [False, True])
def test_smaller_and_larger_residuals(relu: bool) -> None:
    """A map of one pixel plus a whole one, either of which may run last."""
    pooled: Callable[..., Tensor] = lambda s, x: s.a(x.mean((2, 3), keepdim=True))  # noqa: E731
    for run in (lambda s, x: s.b(x) + pooled(s, x), lambda s, x: pooled(s, x) + s.b(x)):
        stage = Stage(lambda s, x, run=run: run(s, x).relu() if relu else run(s, x), a=conv(), b=conv())
        folded, fused, count, _ = folded_and_fused(stage)
        assert count == 2
        x = features(2, 3, 5, 6)
        same(fused(x), folded(x))


def test_modules_that_cannot_be_traced() -> None:
    stage = nn.Sequential(conv(), nn.ReLU(), conv())
    assert fuse_convolutions(stage) == (stage, 0, 2)


class Program(nn.Module):
    """Random operations on random earlier values, in place or not; some values have several names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        names = [*["conv"] * 5, *["relu"] * 3, *["add"] * 4, "double", "same", "double_"]
        self.steps = []
        for i in range(choose.randint(3, 12)):
            after = self.steps[-1][0] if self.steps and choose.random() < 0.6 else ""
            name = {"conv": choose.choice(("add", "relu")), "add": "relu"}.get(after) or choose.choice(names)
            # Mostly the latest value and some other, so that chains come about.
            a, b = (i - min(int(choose.expovariate(rate)), i) for rate in choose.sample((2.0, 0.5), 2))
            spelling = choose.choice(list({"relu": RELUS, "add": ADDITIONS}.get(name, [""])))
            self.steps.append((name, spelling, a, b))
            if name == "conv":
                setattr(self, f"conv{i}", conv(kernel=choose.choice((1, 3)), bias=choose.random() < 0.5))
        self.relu, self.relu_in_place, self.same = nn.ReLU(), nn.ReLU(inplace=True), nn.Identity()
        self.shown = choose.randint(0, len(self.steps))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for i, (name, spelling, a, b) in enumerate(self.steps):
            calls: dict[str, Callable[[Tensor], Tensor]] = {
                "conv": lambda value, i=i: getattr(self, f"conv{i}")(value),
                "relu": lambda value, spelling=spelling: RELUS[spelling](self, value),
                "add": lambda value, spelling=spelling, b=b: ADDITIONS[spelling](value, values[b]),
                "double": lambda value: value * 2,
                "double_": lambda value: value.mul_(2),
                "same": self.same,
            }
            values.append(calls[name](values[a]))
        return torch.cat([values[-1], values[self.shown]])


def test_random_programs() -> None:
    """Same results, and the same left in the input, however operations in place and several names mix."""
    calls: Counter[str] = Counter()
    for seed in range(300):
        folded, fused, _, _ = folded_and_fused(Program(seed))
        calls += kinds(fused)
        calls["residual"] += sum(len(n.args) == 2 for n in fused.graph.find_nodes(op="call_module"))
        calls["with ReLU"] += sum(isinstance(m, FusedConv) and m.relu for m in fused.modules())
        x = features(2, 3, 4, 3, seed=seed)
        seen = x.clone(), x.clone()
        got, expected = fused(seen[0]), folded(seen[1])
        scale = float(expected.abs().max().clamp_min(1))
        torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=1e-12, msg=f"seed {seed}")
        same(*seen)
    assert calls["FusedConv"] > 400
    assert calls["residual"] > 40
    assert calls["with ReLU"] > 60
    assert calls["add"] + calls["add_"] > 100
    assert not calls["Conv2d"]


class Cudnn:
    """Plain PyTorch behind the names of cuDNN's fused convolutions, and a record of what they were called with."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        monkeypatch.setattr(torch, "cudnn_convolution_relu", self.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", self.add_relu)
        monkeypatch.setattr(fusing, "_on_cuda", lambda x: True)

    def relu(self, x: Tensor, weight: Tensor, bias: Tensor, *geometry: object) -> Tensor:
        self.calls.append("relu")
        return self._sum(x, weight, bias, geometry).relu().to(x.dtype)

    def add_relu(self, x: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *geometry: object) -> Tensor:
        self.calls.append("add_relu")
        conv = self._sum(x, weight, bias, geometry)
        assert alpha == 1
        assert z.shape == conv.shape
        assert z.dtype == x.dtype
        return (conv + z.double()).relu().to(x.dtype)

    @staticmethod
    def _sum(x: Tensor, weight: Tensor, bias: Tensor, geometry: tuple[object, ...]) -> Tensor:
        assert bias is not None  # else PyTorch fills one at every call
        assert bias.dtype == weight.dtype == x.dtype
        return F.conv2d(x.double(), weight.double(), bias.double(), *geometry)


def half_error(stage: nn.Module, dtype: torch.dtype, x: Tensor) -> float:
    """Of the folded stage in eager PyTorch, in `dtype`; x float64."""
    folded, _ = fold_stage(stage, dtype)
    exact, _ = fold_stage(stage, DOUBLE)
    return float((folded(x.to(dtype)).double() - exact(x.double())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_calls_of_cudnn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stem, identity and projection shortcuts, odd geometry: in the CUDA branch with its kernels' twins."""
    more = {"stride": (2, 1), "padding": (0, 3), "dilation": (1, 2), "groups": 2}
    odd = nn.Sequential(nn.Conv2d(16, 6, (1, 3), **more), nn.ReLU())
    blocks = zoo.eenet("eenet20", 1, input_shape=(3, 9, 9)).stages[0]
    stage = lived_in(nn.Sequential(blocks, trunk(20, 3)[1][3], nn.Conv2d(32, 16, 1), odd), 1)
    x = images(3, (3, 9, 9)).to(dtype).double()
    exact, _ = fold_stage(stage, DOUBLE)
    folded, fused, count, total = folded_and_fused(stage, dtype)
    cudnn = Cudnn(monkeypatch)
    got = fused(x.to(dtype))
    assert got.dtype == dtype
    shortcuts = sum("add" in str(node.target) for node in folded.graph.nodes)
    assert Counter(cudnn.calls) == {"add_relu": shortcuts, "relu": total - shortcuts - 2}
    assert count == total
    tolerance = 2 * half_error(stage, dtype, x)
    assert tolerance < float(exact(x).abs().max()) / 10
    torch.testing.assert_close(got.double(), exact(x), rtol=0, atol=tolerance)


def test_where_cudnn_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = Cudnn(monkeypatch)
    layer = conv(3, 4)
    fused = FusedConv(layer, relu=True)
    x = images(2, (3, 5, 5))
    before = F.conv2d(x, fused.weight, fused.bias, 1, 1)
    cases = {
        "another shape": (fused, (x, torch.ones(4, 1, 1)), (before + 1).relu()),
        "no batch": (fused, (x[0],), before[0].relu()),
        "no batch, with residual": (fused, (x[0], torch.ones_like(before[0])), (before[0] + 1).relu()),
        "no ReLU": (FusedConv(layer, relu=False), (x,), before),
    }
    for name, (module, arguments, expected) in cases.items():
        torch.testing.assert_close(module(*arguments), expected, rtol=1e-5, atol=1e-5, msg=name)
    same(fused.double()(x.double()), F.conv2d(x.double(), fused.weight, fused.bias, 1, 1).relu())
    assert not cudnn.calls
    fused.float()(x)
    assert cudnn.calls == ["relu"]


@pytest.mark.parametrize("rows", [0, 1, 31])
def test_batches_and_residuals_stay_as_they_are(rows: int) -> None:
    fused = FusedConv(lived_in(conv(), 1), relu=False)
    x = images(rows, (3, 4, 4))
    residual = x.clone()
    assert fused(x, residual).shape == x.shape
    assert torch.equal(x, residual)
    assert "relu=False" in str(fused)


INDEXED = {
    "stem and blocks": ("eenet20", (3, 9, 9), 0),
    "a projection first": ("eenet20", (3, 12, 12), 1),
    "an input that is added later": ("eenet20", (3, 12, 12), 2),
    "bottlenecks": ("eenet50", (3, 33, 33), 1),
}


def stages_of(name: str, shape: tuple[int, ...]) -> list[nn.Module]:
    placement = [1, 4, 5] if name == "eenet20" else [3, 5]
    return list(lived_in(zoo.eenet(name, len(placement), placement, "pool", input_shape=shape), 1).stages)


@pytest.mark.parametrize("name", INDEXED)
def test_indexed_stages(name: str) -> None:
    """Survivors in odd order, dead rows full of NaN; fewer live ones than rows."""
    network, shape, index = INDEXED[name]
    x = images(7, shape)
    stages = stages_of(network, shape)
    for stage in stages[:index]:
        x = stage(x)
    stage = stages[index]
    folded, fused, _, _ = folded_and_fused(stage, torch.float32)
    indexed, why = indexed_stage(fused)
    assert why == ""
    assert indexed is not None
    x[[0, 2, 5]] = torch.nan
    x = x.contiguous(memory_format=torch.channels_last)
    alive = [6, 1, 4, 3]
    rows = torch.tensor([*alive, 1234, -5], dtype=torch.int32)
    exact, _ = fold_stage(stage, DOUBLE)
    expected = exact(x[alive].double())
    tolerance = 2 * float((folded(x[alive]).double() - expected).abs().max())
    for live in (4, 3, 1, 0):
        got = indexed(x, rows, torch.tensor([live], dtype=torch.int32))
        assert got.shape == (len(rows), *expected.shape[1:])
        torch.testing.assert_close(got[:live].double(), expected[:live], rtol=0, atol=tolerance)
    counted = device_counted(stage, torch.float32)
    assert counted is not None
    compacted = torch.cat([x[alive], x[:1]]).contiguous(memory_format=torch.channels_last)
    got = counted(compacted, None, torch.tensor([4], dtype=torch.int32))
    assert len(got) == 5
    torch.testing.assert_close(got[:4].double(), expected, rtol=0, atol=tolerance)


def test_who_reads_through_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """First convolutions and shortcuts of the input, and nobody else; an input that is added later is gathered."""
    seen: list[tuple[bool, bool, bool]] = []

    def recorded(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, rows: Tensor | None,
                 residual_through_rows: bool, live: Tensor, stride: int, relu: bool) -> Tensor:  # fmt: skip
        seen.append((rows is not None, residual_through_rows, relu))
        assert bias.dtype == torch.float32
        assert live.item() == 2
        return ops.indexed_conv(x, weight, bias, residual, rows, residual_through_rows, live, stride, relu)

    original, gathered = ops.compact, []
    twin = type("Ops", (), {"indexed_conv": staticmethod(recorded), "compact": staticmethod(
        lambda *tensors: (gathered.append(len(tensors[0])), original(*tensors)))})  # fmt: skip
    monkeypatch.setattr(fusing, "ops", twin)
    rows, live = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([2], dtype=torch.int32)
    x = images(5, (3, 6, 6)).contiguous(memory_format=torch.channels_last)
    cases = [
        (lambda s, x: s.a(x).relu(), [(True, False, True)], 0),
        (lambda s, x: (s.a(x) + x).relu(), [(True, True, True)], 0),
        (lambda s, x: (s.b(s.a(x)) + s.c(x)).relu(), [(True, False, False), (False, False, False),
                                                      (True, False, True)], 0),
        (lambda s, x: (s.b(s.a(x).relu()) + x).relu(), [(False, False, True), (False, False, True)], 1),
    ]  # fmt: skip
    for run, expected, copies in cases:
        seen.clear()
        gathered.clear()
        folded, fused, _, _ = folded_and_fused(Stage(run, a=conv(), b=conv(), c=conv(kernel=1)), torch.float32)
        indexed, _ = indexed_stage(fused)
        assert indexed is not None
        torch.testing.assert_close(indexed(x, rows, live), folded(x[[4, 0]]), rtol=1e-5, atol=1e-5)
        assert seen == expected
        assert len(gathered) == copies


OBSTACLES = {
    "MaxPool2d": nn.Sequential(conv(), nn.ReLU(), nn.MaxPool2d(2)),
    "SiLU": nn.Sequential(conv(), nn.SiLU(), conv()),
    "mul": Stage(lambda s, x: s.a(x * 2), a=conv()),
    "reflect": nn.Sequential(conv(padding_mode="reflect")),
    "kernel (5, 5)": nn.Sequential(conv(), conv(kernel=5)),
    "stride (3, 3)": nn.Sequential(conv(kernel=1, stride=3)),
    "padding (0, 0)": nn.Sequential(conv(padding=0)),
    "dilation (2, 2)": nn.Sequential(conv(dilation=2, padding=2)),
    "3 groups": nn.Sequential(conv(groups=3)),
    "returns input": nn.Sequential(nn.Identity()),
    "returns (": Stage(lambda s, x: (s.a(x), x), a=conv()),
}


@pytest.mark.parametrize("words", OBSTACLES)
def test_stages_that_cannot_be_indexed(words: str) -> None:
    stage, why = indexed_stage(folded_and_fused(OBSTACLES[words])[1])
    assert stage is None
    assert device_counted(OBSTACLES[words], torch.float32) is None
    assert words in why
    assert "eefast.ops.compact" in why


def test_stages_without_a_graph_cannot_be_indexed() -> None:
    stage, why = indexed_stage(conv())
    assert stage is None
    assert "Conv2d" in why


def basic_block() -> nn.Module:
    return lived_in(trunk(20, 3)[1][0], 1)


def test_on_the_cpu_the_folded_stage_runs() -> None:
    stage, note = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)))
    assert note == "folded"
    assert kinds(stage)["Conv2d"] == 2
    # A bare module of PyTorch's own is traced too.
    assert fastest_stage(conv(), torch.float32, images(1, (3, 5, 5)))[1] == "folded"


def test_an_example_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"example has shape \[0, 16, 5, 5\]; pass at least one"):
        fastest_stage(basic_block(), torch.float32, torch.empty(0, 16, 5, 5))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds by the name of a class; candidates take as long as it says here."""
    seconds: dict[str, float] = {}
    monkeypatch.setattr(
        fusing, "_seconds", lambda ways, features: [next(s for c, s in seconds.items() if is_of(w, c)) for w in ways]
    )
    return seconds


def is_of(way: nn.Module, name: str) -> bool:
    return any(type(m).__name__ == name for m in way.modules())


@pytest.mark.usefixtures("poison_fresh_memory")
def test_the_fastest_of_folded_and_fused(monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    Cudnn(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: pytest.fail("every convolution was fused"))
    x = images(2, (16, 5, 5))
    for fused_seconds, note in ((1.0, "fused (2 of 2 convolutions), 1.4× folded"), (3.0, "folded")):
        slow |= {"FusedConv": fused_seconds, "Conv2d": 1.4}
        stage, found = fastest_stage(basic_block(), torch.float32, x)
        assert found == note
        assert is_of(stage, "FusedConv") == (note != "folded")


class Compiled(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_what_is_not_wholly_fused_is_compiled_too(monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    Cudnn(monkeypatch)
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(torch, "compile", lambda m, **options: (asked.append(options), Compiled(m))[1])
    slow |= {"Compiled": 1.0, "FusedConv": 1.2, "Conv2d": 2.0}
    silu = nn.Sequential(conv(), nn.ReLU(), conv(), nn.SiLU())
    stage, note = fastest_stage(silu, torch.float32, images(2, (3, 5, 5)))
    assert note == "torch.compile, 2.0× folded"
    assert isinstance(stage, Compiled)
    slow["Compiled"] = 3.0
    assert fastest_stage(silu, torch.float32, images(2, (3, 5, 5)))[1] == "fused (1 of 2 convolutions), 1.7× folded"
    untraceable = Stage(lambda s, x: s.a(x) if x.sum() > 1e9 else s.a(x).relu(), a=conv())
    note = fastest_stage(untraceable, torch.float32, images(2, (3, 5, 5)))[1]
    assert note == "not folded: torch.fx cannot trace it (TraceError)"
    assert asked == [{"dynamic": True}] * 3


@pytest.mark.parametrize("fault", ["raises", "wrong", "NaN"])
def test_candidates_that_fail_are_left_out(fault: str, monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    cudnn = Cudnn(monkeypatch)

    def broken(*arguments: object) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no engine\nfound")
        return cudnn.relu(*arguments) + (1e-4 if fault == "wrong" else torch.nan)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", broken)
    slow |= {"FusedConv": 1.0, "Conv2d": 2.0}
    stage, note = fastest_stage(basic_block(), torch.float32, images(2, (16, 5, 5)))
    assert not is_of(stage, "FusedConv")
    reason = "RuntimeError: no engine" if fault == "raises" else "its error is "
    assert note.startswith(f"folded; fused (2 of 2 convolutions) left out: {reason}")
    assert "found" not in note


def test_stages_that_know_no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    Cudnn(monkeypatch)
    stage = Stage(lambda s, x: s.a(x.float()).relu(), a=conv())
    found, note = fastest_stage(stage, torch.float32, images(2, (3, 5, 5)))
    assert not is_of(found, "FusedConv")
    assert note.startswith("folded; not measured, since float64 fails: RuntimeError: Input type (float)")


def test_stages_that_change_their_input(monkeypatch: pytest.MonkeyPatch, slow: dict[str, float]) -> None:
    Cudnn(monkeypatch)
    slow |= {"FusedConv": 1.0, "Conv2d": 2.0}
    x = images(2, (3, 5, 5)).contiguous(memory_format=torch.channels_last)
    before = x.clone()
    stage = Stage(lambda s, x: s.a(x.mul_(2)).relu(), a=conv())
    assert fastest_stage(stage, torch.float32, x)[1] == "fused (1 of 1 convolutions), 2.0× folded"
    assert torch.equal(x, before)


def test_seconds_are_the_least_of_rounds_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([value for r in range(fusing.ROUNDS) for value in (0, 10 - r, 0, 20 + r)])
    monkeypatch.setattr(fusing.time, "perf_counter", lambda: next(clock))
    calls: list[str] = []
    ways = [lambda x: calls.append("a"), lambda x: calls.append("b")]
    assert fusing._seconds(ways, torch.zeros(1)) == [10 - fusing.ROUNDS + 1, 20]
    assert calls == ["a", "b"] * fusing.ROUNDS


HALVES = [torch.float16, torch.bfloat16]
gpu = pytest.mark.gpu


def on_gpu(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.cuda().to(dtype, memory_format=torch.channels_last)


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", BLOCKS)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Every stage in cuDNN's kernels, in batches of several sizes, while free memory is full of NaN."""
    depth, shape = BLOCKS[name]
    net = lived_in(zoo.eenet(depth, 2, "fine", "pool", num_classes=7, input_shape=shape), 1).cuda()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for n in (1, 3, 31, 257):
            x = images(n, shape).double().cuda()
            for stage in net.stages:
                folded, _ = fold_stage(nn.Sequential(stage), dtype)
                exact, _ = fold_stage(nn.Sequential(stage), DOUBLE)
                fused, count, total = fuse_convolutions(folded)
                assert count == total
                x = x.to(dtype).double()
                expected, given = exact(x), on_gpu(x, dtype)
                torch.full_like(expected.repeat(4, 1, 1, 1), torch.nan)  # freed at once: the next maps get this memory
                tolerance = 2 * (folded(given).double() - expected).abs().max().item()
                torch.testing.assert_close(fused(given).double(), expected, rtol=0, atol=tolerance)
                x = expected


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_an_input_that_is_its_own_residual(dtype: torch.dtype) -> None:
    """Before 8.3 cuDNN went wrong there: https://github.com/pytorch/pytorch/issues/62926."""
    layer = lived_in(conv(16, 16, 1), 1).cuda().to(dtype, memory_format=torch.channels_last)
    x = on_gpu(images(31, (16, 7, 5)), dtype)
    got = FusedConv(layer, relu=True)(x, x)
    exact = (F.conv2d(x.double(), layer.weight.double(), layer.bias.double()) + x.double()).relu()
    tolerance = 2 * ((layer(x) + x).relu().double() - exact).abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance)


@gpu
def test_nan_stays_nan() -> None:
    """As behind PyTorch's ReLU: such a sample must not look as if it were healthy."""
    layer = lived_in(conv(16, 16), 1).cuda().to(torch.float16, memory_format=torch.channels_last)
    x = on_gpu(images(3, (16, 5, 5)), torch.float16)
    x[1, :, 2, 2] = torch.nan
    fused = FusedConv(layer, relu=True)
    for got in (fused(x), fused(x, torch.zeros_like(x))):
        assert torch.equal(got.isnan(), layer(x).isnan())


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_capture_in_a_graph(dtype: torch.dtype) -> None:
    stage = basic_block().cuda()
    fused, _, _ = fuse_convolutions(fold_stage(nn.Sequential(stage), dtype)[0])
    given = on_gpu(images(31, (16, 8, 8)), dtype)
    fused(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused(given)
    given.copy_(on_gpu(images(31, (16, 8, 8), seed=2), dtype))
    graph.replay()
    assert torch.equal(out, fused(given))


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_the_fastest_on_a_gpu(dtype: torch.dtype) -> None:
    for stage, words in ((basic_block(), "of 2 conv"), (nn.Sequential(conv(16, 16), nn.SiLU()), "torch.compile")):
        x = images(64, (16, 8, 8)).cuda()
        found, note = fastest_stage(stage.cuda(), dtype, x)
        assert words in note or note.startswith("folded")
        assert "left out" not in note, note
        given = on_gpu(x, dtype)
        folded, _ = fold_stage(nn.Sequential(stage), dtype)
        torch.testing.assert_close(found(given), folded(given), rtol=2e-2, atol=2e-2)


@gpu
@pytest.mark.parametrize("dtype", HALVES)
def test_indexed_stages_on_a_gpu(dtype: torch.dtype) -> None:
    x = images(31, (3, 12, 12)).cuda()
    stages = [stage.cuda() for stage in stages_of("eenet20", (3, 12, 12))]
    for stage in stages:
        folded, _ = fold_stage(nn.Sequential(stage), dtype)
        exact, _ = fold_stage(nn.Sequential(stage), DOUBLE)
        indexed, why = indexed_stage(fuse_convolutions(folded)[0])
        assert indexed is not None, why
        given = on_gpu(x, dtype)
        rows = torch.randperm(31, dtype=torch.int32, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        alive = given[rows[:17].long()]
        expected = exact(alive.double())
        tolerance = 2 * (folded(alive).double() - expected).abs().max().item()
        got = indexed(given, rows, torch.tensor([17], dtype=torch.int32, device="cuda"))[:17]
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
        x = exact(given.double()).float()
