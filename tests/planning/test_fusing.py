"""Fused convolutions: the unfused stage's features for networks, spellings and random programs; calls of cuDNN."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from fused_stages import (
    ADDITIONS,
    DOUBLE,
    HALVES,
    RELUS,
    Cudnn,
    basic_block,
    conv,
    features,
    folded_and_fused,
    kinds,
    on_gpu,
    same,
)  # fmt: skip
from networks import Stage, images, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

from eefast import zoo
from eefast.planning.folding import fold_stage
from eefast.planning.fusing import FusedConv, fuse_convolutions
from eefast.zoo.resnets import trunk

pytestmark = pytest.mark.usefixtures("seeded_without_gradients")
gpu = pytest.mark.gpu

NETWORKS = {
    "eenet20": ("eenet20", (3, 13, 9)),
    "eenet18": ("eenet18", (3, 33, 40)),
    "eenet50": ("eenet50", (1, 33, 33)),
}


def first_blocks(depth: int, in_channels: int) -> list[nn.Module]:
    """Two stages with every kind of block that a network has: its stem and two blocks, then the first that resizes."""
    stem, blocks, _ = trunk(depth, in_channels)
    resizing = next(block for block in blocks if block.downsample is not None and block.downsample[0].stride == (2, 2))
    return [nn.Sequential(stem, *blocks[:2]), resizing]


@pytest.mark.parametrize(("depth", "shape"), [(20, (3, 13, 9)), (18, (3, 33, 40)), (50, (1, 33, 33))])
def test_stages_of_the_zoo(depth: int, shape: tuple[int, int, int]) -> None:
    """Nothing but fused convolutions and the stem's pooling is left, with the same features."""
    x = images(3, shape).double()
    for stage in first_blocks(depth, shape[0]):
        folded, fused, count, total = folded_and_fused(stage)
        assert count == total > 0
        assert kinds(fused) - Counter(MaxPool2d=1) == Counter(FusedConv=total)
        expected = folded(x)
        same(fused(x), expected)
        x = expected


@pytest.mark.parametrize(("kind", "wide"), [("resnet18", 64), ("resnet50", 256)])
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_layers_of_torchvision(kind: str, wide: int, layer: str) -> None:
    """Which write `out += identity`."""
    block = torchvision.models.resnet.BasicBlock if kind == "resnet18" else torchvision.models.resnet.Bottleneck
    net = torchvision.models.ResNet(block, [2, 2, 1, 1])
    folded, fused, count, total = folded_and_fused(getattr(net, layer))
    assert count == total
    assert kinds(fused) == Counter(FusedConv=total)
    x = features(2, 64 if layer == "layer1" else wide, 5, 7)
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
    "its input is added": (through(lambda s, x, act: act(s.b(y := s.a(x)) + y)), 2),
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
    assert counts["its input is added"] == (2, 2)
    assert counts["called twice"] == (2, 2)


def pooled(s: Any, x: Tensor) -> Tensor:
    return s.a(x.mean((2, 3), keepdim=True))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "run",
    [lambda s, x: s.b(x) + pooled(s, x), lambda s, x: pooled(s, x) + s.b(x)],
    ids=["one pixel last", "one pixel first"],
)
@pytest.mark.parametrize("relu", [False, True])
def test_smaller_and_larger_residuals(relu: bool, run: Callable[..., Tensor]) -> None:
    """A map of one pixel plus a whole one, either of which may run last."""
    stage = Stage(lambda s, x: run(s, x).relu() if relu else run(s, x), a=conv(), b=conv())
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
    for seed in range(100):
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
    # Every kind of fusion, and calls that none takes, come up often enough.
    assert calls["FusedConv"] > 130
    assert calls["residual"] > 13
    assert calls["with ReLU"] > 20
    assert calls["add"] + calls["add_"] > 33
    assert not calls["Conv2d"]


def half_error(stage: nn.Module, dtype: torch.dtype, x: Tensor) -> float:
    """Of the folded stage in eager PyTorch, in `dtype`; x float64."""
    folded, _ = fold_stage(stage, dtype)
    exact, _ = fold_stage(stage, DOUBLE)
    return float((folded(x.to(dtype)).double() - exact(x.double())).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_calls_of_cudnn(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stem, identity and projection shortcuts, odd geometry: the CUDA branch, with plain PyTorch as its kernels."""
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


@pytest.mark.parametrize(
    ("relu", "call", "expected"),
    [
        (True, lambda fused, x: fused(x, torch.ones(4, 1, 1)), lambda y: (y + 1).relu()),
        (True, lambda fused, x: fused(x[0]), lambda y: y[0].relu()),
        (True, lambda fused, x: fused(x[0], torch.ones(4, 5, 5)), lambda y: (y[0] + 1).relu()),
        (False, lambda fused, x: fused(x), lambda y: y),
        (True, lambda fused, x: fused.double()(x.double()).float(), lambda y: y.relu()),
    ],
    ids=["another shape", "no batch", "no batch, with residual", "no ReLU", "float64"],
)
def test_where_cudnn_is_not_called(relu: bool, call: Any, expected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, x = Cudnn(monkeypatch), images(2, (3, 5, 5))
    fused = FusedConv(conv(3, 4), relu)
    before = F.conv2d(x, fused.weight, fused.bias, 1, 1)
    torch.testing.assert_close(call(fused, x), expected(before), rtol=1e-5, atol=1e-5)
    assert not cudnn.calls
    FusedConv(conv(3, 4), relu=True)(x)
    assert cudnn.calls == ["relu"]


@pytest.mark.parametrize("rows", [0, 1, 31])
def test_batches_and_residuals_stay_as_they_are(rows: int) -> None:
    fused = FusedConv(lived_in(conv(), 1), relu=False)
    x = images(rows, (3, 4, 4))
    residual = x.clone()
    assert fused(x, residual).shape == x.shape
    assert torch.equal(x, residual)
    assert "relu=False" in str(fused)


@gpu
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    """Every stage in cuDNN's kernels, in batches of several sizes, while free memory is full of NaN."""
    depth, shape = NETWORKS[name]
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
@pytest.mark.parametrize("residual", [False, True], ids=["no residual", "residual"])
def test_nan_stays_nan(residual: bool) -> None:
    """As after PyTorch's ReLU: such a sample must not look sound."""
    layer = lived_in(conv(16, 16), 1).cuda().to(torch.float16, memory_format=torch.channels_last)
    x = on_gpu(images(3, (16, 5, 5)), torch.float16)
    x[1, :, 2, 2] = torch.nan
    fused = FusedConv(layer, relu=True)
    got = fused(x, torch.zeros_like(x)) if residual else fused(x)
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
