"""Every layer of the resident engine in C++ against float64, at odd sizes, in every batch, with every thread team."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from networks import Stage, images, lived_in
from resident_calls import tables
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast import ops
from eefast.heads import ExitHead

pytestmark = pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")

SHAPE = (3, 11, 9)
ACTIVATIONS = (nn.SiLU, nn.Hardswish, nn.ReLU6, nn.GELU, nn.Sigmoid, nn.Hardsigmoid)


def depthwise(kernel: int, stride: int) -> Callable[[int], nn.Module]:
    return lambda c: nn.Conv2d(c, c, kernel, stride, kernel // 2, groups=c)


def grouped(inputs: int, outputs: int, stride: int) -> Callable[[int], nn.Module]:
    """Of `c` groups, after as many channels as they need."""
    return lambda c: nn.Sequential(
        nn.Conv2d(c, c * inputs, 1),
        nn.Conv2d(c * inputs, c * outputs, 3, stride, 1, groups=c),
        nn.Conv2d(c * outputs, c, 1),
    )


def gate(activation: nn.Module, last: nn.Module) -> Callable[[int], nn.Module]:
    def make(c: int) -> nn.Module:
        layers = {"pool": nn.AdaptiveAvgPool2d(1), "first": nn.Conv2d(c, 7, 1), "second": nn.Conv2d(7, c, 1)}
        return Stage(
            lambda s, x: x * s.last(s.second(s.activation(s.first(s.pool(x))))),
            activation=activation,
            last=last,
            **layers,
        )

    return make


def joined(c: int) -> nn.Module:
    layers = {"a": nn.Conv2d(c, 5, 1), "b": nn.Conv2d(c, 16, 3, padding=1), "c": nn.Conv2d(c + 21, c, 1)}
    return Stage(lambda s, x: s.c(torch.cat([s.a(x), x, s.b(x)], 1)), **layers)


def dense(c: int) -> nn.Module:
    """DenseNet's layers, whose maps are joined in one where channels fill blocks."""
    convs = {f"conv{i}": nn.Conv2d(32 + 16 * i, 16, 3, padding=1) for i in range(3)}
    norms = {f"norm{i}": nn.BatchNorm2d(32 + 16 * i) for i in range(3)}

    def run(s: nn.Module, x: Tensor) -> Tensor:
        maps = [s.first(x)]
        for i in range(3):
            y = torch.cat(maps, 1)
            maps.append(getattr(s, f"conv{i}")(F.relu(getattr(s, f"norm{i}")(y))))
        return s.last(torch.cat(maps, 1))

    return Stage(run, first=nn.Conv2d(c, 32, 1), last=nn.Conv2d(80, c, 1), **convs, **norms)


def summed(c: int) -> nn.Module:
    """Residuals of every kind of convolution, and an addition of what is none."""
    layers = {"a": depthwise(3, 1)(c), "b": nn.Conv2d(c, c, 1), "c": nn.Conv2d(c, c, 3, padding=1)}
    return Stage(lambda s, x: F.silu(s.a(x) + x) + F.gelu(y := s.b(x) + x) + F.hardswish(s.c(y) + x), **layers)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"depthwise {k}×{k}, stride {s}": depthwise(k, s) for k in (3, 5, 7) for s in (1, 2)},
    "depthwise 2×2": depthwise(2, 1),
    "depthwise 9×9, stride 2": depthwise(9, 2),
    "groups of 4": grouped(4, 4, 1),
    "groups of 8, stride 2": grouped(8, 8, 2),
    "groups of 5 and 3": grouped(5, 3, 1),
    **{f"{a.__name__} of a 1×1": (lambda c, a=a: nn.Sequential(nn.Conv2d(c, c, 1), a())) for a in ACTIVATIONS},
    **{
        f"{a.__name__} of a 3×3": (lambda c, a=a: nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), a())) for a in ACTIVATIONS[:2]
    },
    "SiLU of a pooling": lambda c: nn.Sequential(nn.MaxPool2d(2), nn.SiLU()),
    "mean pooling": lambda c: nn.AvgPool2d(2),
    "mean pooling inside": lambda c: nn.AvgPool2d(3, 1, 1),
    "5×5": lambda c: nn.Conv2d(c, c, 5, 1, 2),
    "7×7, stride 2": lambda c: nn.Conv2d(c, c, 7, 2, 3),
    "row of 3": lambda c: nn.Sequential(nn.Conv2d(c, c, (1, 3), 1, (0, 1)), nn.SiLU()),
    "row of 5": lambda c: nn.Conv2d(c, c, (1, 5), 1, (0, 2)),
    "row of 4, stride 2": lambda c: nn.Conv2d(c, c, (1, 4), 2, (0, 1)),
    "depthwise row of 3": lambda c: nn.Conv2d(c, c, (1, 3), 1, (0, 1), groups=c),
    "row of 3 in groups of 4": lambda c: nn.Sequential(nn.Conv2d(c, 12, 1), nn.Conv2d(12, 12, (1, 3), 1, (0, 1), 1, 3)),
    "row of 3 in groups of 5": lambda c: nn.Sequential(nn.Conv2d(c, 15, 1), nn.Conv2d(15, 30, (1, 3), 1, (0, 1), 1, 3)),
    "largest of a row of 3": lambda c: nn.MaxPool2d((1, 3), 2, (0, 1)),
    "mean of a row of 2": lambda c: nn.AvgPool2d((1, 2), 1),
    "gate": gate(nn.SiLU(), nn.Sigmoid()),
    "hard gate": gate(nn.ReLU(), nn.Hardsigmoid()),
    "joined": joined,
    "dense": dense,
    "summed": summed,
}


def network(layer: nn.Module, channels: int, shape: tuple[int, int, int] = SHAPE, seed: int = 1) -> eefast.EarlyExitNet:
    first = nn.Sequential(nn.Conv2d(shape[0], channels, 3, padding=1), nn.BatchNorm2d(channels), layer)
    with torch.no_grad():
        features = first.eval()(torch.zeros(1, *shape)).shape[1:]
    heads = [ExitHead("pool", tuple(features), 5, shape), ExitHead("pool", (20, *features[1:]), 5, shape)]
    stages = [first, nn.Conv2d(features[0], 20, 1)]
    return lived_in(eefast.EarlyExitNet(stages, heads, input_shape=shape), seed)


def run(
    net: eefast.EarlyExitNet, x: Tensor, exit_index: int, threads: int = 1, bfloat16: bool = False, **more: int
) -> Tensor:
    """Logits and confidence [N, 6] of one exit."""
    limits = torch.tensor([-1.0 if exit_index == 0 else 2.0])
    program = tables(net, bfloat16=bfloat16, **more)
    logits, confidence, exits = ops.resident_forward.run(x, *program, limits, "learned", 5, bfloat16, threads)
    assert (exits == exit_index).all()
    return torch.cat([logits, confidence[:, None]], 1)


def exact(net: eefast.EarlyExitNet, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = copy.deepcopy(net).double().all_exits(x.double())
    return [torch.cat([out.logits, out.confidence_logit[:, None].sigmoid()], 1).float() for out in outputs]


FEW_CHANNELS = ("depthwise 3×3, stride 1", "depthwise 5×5, stride 2", "groups of 5 and 3", "gate", "joined", "summed")
CASES = [*((name, 17) for name in LAYERS), *((name, c) for name in FEW_CHANNELS for c in (1, 3, 5))]


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_every_layer_matches_float64(name: str, channels: int) -> None:
    """In groups, and by a few threads, to the bit as alone."""
    net = network(LAYERS[name](channels), channels)
    x = images(5, SHAPE)
    for i, wanted in enumerate(exact(net, x)):
        found = run(net, x, i)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max().clamp_min(1)))
        assert torch.equal(run(net, x, i, group=3), found)
        if channels == 17:
            assert torch.equal(run(net, x[3:4], i, threads=3), found[3:4])
            fast = run(net, x, i, algorithm=4)
            torch.testing.assert_close(fast, wanted, rtol=0, atol=5e-5 * float(wanted.abs().max().clamp_min(1)))


def rows(length: int, channels: int) -> tuple[eefast.EarlyExitNet, Tensor]:
    """A residual block on maps of one row, and inputs."""
    first, second = (nn.Conv2d(channels, channels, (1, 3), 1, (0, 1)) for _ in range(2))
    block = Stage(lambda s, x: F.relu(s.b(F.relu(s.a(x))) + x), a=first, b=second)
    shape = (5, 1, length)
    heads = [ExitHead("pool", (channels, 1, length), 5, shape) for _ in range(2)]
    net = eefast.EarlyExitNet([nn.Conv2d(5, channels, (1, 3), 1, (0, 1)), block], heads, input_shape=shape)
    return lived_in(net, 1), images(7, shape)


@pytest.mark.parametrize("side", [2, 4])
@pytest.mark.parametrize(
    ("length", "channels"), [(1, 33), (2, 16), (3, 65), (5, 17), (31, 32), (128, 16), (257, 64), (515, 130)]
)
def test_winograd_of_rows(length: int, channels: int, side: int) -> None:
    """Beside float64; alone, in groups that share a pass, and by teams of threads, to the bit the same."""
    net, x = rows(length, channels)
    wanted = exact(net, x)[1]
    found = run(net, x, 1, algorithm=side)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max().clamp_min(1)))
    assert not torch.equal(found, run(net, x, 1))  # direct sums round differently
    assert torch.equal(run(net, x, 1, algorithm=side, group=4), found)
    for threads in (2, 3):
        assert torch.equal(run(net, x[:1], 1, threads, algorithm=side), found[:1])


@pytest.fixture(scope="module")
def mixed() -> eefast.EarlyExitNet:
    """All kinds of layers one after the other."""
    names = ("groups of 4", "gate", "depthwise 5×5, stride 2", "dense", "summed", "hard gate", "joined", "mean pooling")
    names += (
        "depthwise 3×3, stride 1",
        "GELU of a 1×1",
        "depthwise 7×7, stride 1",
        "ReLU6 of a 1×1",
        "groups of 5 and 3",
    )
    torch.manual_seed(0)
    return network(nn.Sequential(*(LAYERS[name](17) for name in names)), 17, (3, 19, 17), 3)


@pytest.mark.parametrize("n", [0, 1, 3, 31])
def test_layers_in_every_batch(mixed: eefast.EarlyExitNet, n: int) -> None:
    x = images(31, mixed.input_shape)[:n]
    found = run(mixed, x, 1)
    wanted = exact(mixed, x)[1]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()) if n else 0)
    for threads, group in ((1, 4), (2, 1), (3, 8), (8, 2)):
        assert torch.equal(run(mixed, x, 1, threads, group=group), found)


def test_teams_of_threads_on_one_image_change_no_bit(mixed: eefast.EarlyExitNet) -> None:
    x = images(1, mixed.input_shape)
    wanted = run(mixed, x, 1)
    for threads in (2, 3, 8):
        for _ in range(5):
            assert torch.equal(run(mixed, x, 1, threads), wanted)


def test_layers_of_infinite_pixels(mixed: eefast.EarlyExitNet) -> None:
    """Their own answers are no numbers, those of others do not change, and none of them exits early."""
    x = images(7, mixed.input_shape)
    wanted = run(mixed, x, 1, group=4)
    x[2, 1, 3, 3], x[5] = torch.inf, torch.nan
    limits = torch.tensor([2.0])
    logits, _, exits = ops.resident_forward.run(x, *tables(mixed, group=4), limits, "learned", 5)
    others = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(logits[others], wanted[others, :5])
    assert logits[5].isnan().all()
    assert (exits == 1).all()


@pytest.mark.skipif(ops.instruction_set() != "avx512_bf16", reason=f"no AVX512-BF16, but {ops.instruction_set()}")
@pytest.mark.parametrize("name", ["depthwise 3×3, stride 2", "groups of 5 and 3", "gate", "dense", "summed"])
def test_layers_in_bfloat16(name: str) -> None:
    net = network(LAYERS[name](17), 17)
    x = images(5, SHAPE)
    for i, wanted in enumerate(exact(net, x)):
        found = run(net, x, i, bfloat16=True)
        assert (found - wanted).abs().max() <= 0.03 * float(wanted.abs().max().clamp_min(1))
        assert torch.equal(run(net, x, i, 3, True, group=3), found)


def test_steps_that_only_the_cpu_has_are_refused_in_int8() -> None:
    net = network(LAYERS["gate"](17), 17)
    steps, maps, groups, weights, packed = tables(net)
    image = torch.ones(2, 3)
    zeros = torch.cat([maps, torch.zeros(len(maps), 1, dtype=torch.int64)], 1)
    arguments = steps, zeros, groups, weights.double(), packed, net.thresholds, image, "learned", 5
    with pytest.raises(RuntimeError, match=r"steps\[\d\] = .*: INT8 has no such step"):
        ops.resident_int8.run(images(1, SHAPE), *arguments)
