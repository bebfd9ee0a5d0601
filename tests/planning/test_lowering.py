"""Networks as steps: what the resident engine refuses, by name, and custom stages whose answers must be PyTorch's."""

from __future__ import annotations

import pytest
import torch
from fused_stages import ADDITIONS, RELUS
from networks import Stage, images, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast import ops, zoo
from eefast.cost import macs
from eefast.heads import ExitHead
from eefast.ops import Kind
from eefast.planning.errors import UnsupportedError
from eefast.planning.lowering import lower
from eefast.planning.packing import program
from eefast.result import ExitOutput

SHAPE = (3, 9, 8)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, **{"padding": kernel // 2, **more})


class Gate(nn.Module):
    """Squeeze and excitation, in the ways of torchvision and timm."""

    def __init__(self, channels: int, squeezed: int, activation: nn.Module, gate: nn.Module, way: str) -> None:
        super().__init__()
        self.pool, self.way = nn.AdaptiveAvgPool2d(1), way
        linear = way == "linear"
        self.first = nn.Linear(channels, squeezed) if linear else nn.Conv2d(channels, squeezed, 1)
        self.second = nn.Linear(squeezed, channels, False) if linear else nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation, gate

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "linear":
            gate = self.second(self.activation(self.first(torch.flatten(self.pool(x), 1))))
            return x * self.gate(gate).view(-1, x_channels(self), 1, 1)
        pooled = self.pool(x) if self.way == "module" else x.mean((2, 3), keepdim=True)
        return self.gate(self.second(self.activation(self.first(pooled)))) * x


def x_channels(gate: Gate) -> int:
    return gate.second.out_features


def dense(s: nn.Module, x: Tensor) -> Tensor:
    """DenseNet's way: every layer reads all maps before it."""
    maps = [s.stem(x)]
    for i in range(3):
        maps.append(getattr(s, f"conv{i}")(getattr(s, f"norm{i}")(torch.cat(maps, 1)).relu()))
    return torch.cat(maps, 1)


def dense_layers(stem: int, growth: int) -> dict[str, nn.Module]:
    widths = [stem + i * growth for i in range(3)]
    norms = {f"norm{i}": nn.BatchNorm2d(width) for i, width in enumerate(widths)}
    return {"stem": conv(3, stem), **norms, **{f"conv{i}": conv(w, growth) for i, w in enumerate(widths)}}


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, 3, stride, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def network(*stages: nn.Module, head: str = "pool") -> eefast.EarlyExitNet:
    heads, shape = [], SHAPE
    for stage in stages:
        _, shape = macs(stage, shape)
        heads.append(ExitHead(head, shape, 5, SHAPE))
    return lived_in(eefast.EarlyExitNet(list(stages), heads, input_shape=SHAPE), 1)


def check(net: eefast.EarlyExitNet, x: Tensor, **kinds: int) -> None:
    """Every exit says what PyTorch says, with every algorithm, and alone as in a group."""
    lowered = lower(net)
    found_kinds = [layer.kind for layer in lowered.layers]
    for kind, count in kinds.items():
        assert found_kinds.count(Kind[kind.upper()]) == count
    with torch.no_grad():
        expected = [out.logits for out in net.all_exits(x.clone())]
    for algorithm, group in ((0, 1), (2, 3), (4, 2)):
        n = len(lowered.sizes)
        p = program(lowered, (algorithm,) * n, (group,) * n, False, {})
        for i, wanted in enumerate(expected):
            limits = torch.tensor([-1.0 if i == j else 2.0 for j in range(net.num_exits)])
            tables = p.steps, p.maps, p.groups, p.weights, p.packed, limits
            logits, _, exits = ops.resident_forward.run(x, *tables, net.criterion.name, net.num_classes)
            assert (exits == i).all()
            torch.testing.assert_close(logits, wanted, rtol=0, atol=float(5e-5 * wanted.abs().max()))


class AddsInPlace(nn.Module):
    """What has two names changes under both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 20), conv(20, 20), conv(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        y = z = self.a(x)
        y += self.b(y)
        return self.c(y) + z


CUSTOM = {
    "the first result is added": Stage(lambda s, x: (y := s.a(x)) + s.b(y), a=conv(3, 20), b=conv(20, 20)),
    "added twice": Stage(
        lambda s, x: (y := s.a(x)) + s.b((z := y + s.b(y)).relu()) + s.c(z),
        a=conv(3, 20), b=conv(20, 20), c=conv(20, 20),
    ),
    "method and function": Stage(
        lambda s, x: F.relu(torch.add(s.b(F.relu(s.a(x))), s.c(x)).relu_(), inplace=True),
        a=conv(3, 20), b=conv(20, 17), c=conv(3, 17, 1),
    ),
    "in place": Stage(
        lambda s, x: s.b(s.relu(y := s.a(x))) + y, a=conv(3, 20), b=conv(20, 20), relu=nn.ReLU(inplace=True)
    ),
    "not in place": Stage(lambda s, x: s.b(s.relu(y := s.a(x))) + y, a=conv(3, 20), b=conv(20, 20), relu=nn.ReLU()),
    "in place by method": Stage(
        lambda s, x: s.b((y := s.a(x)).add_(s.c(x))) + y, a=conv(3, 9), b=conv(9, 9), c=conv(3, 9)
    ),
    "in place by operator": AddsInPlace(),
    "pre-activation": nn.Sequential(conv(3, 20), nn.BatchNorm2d(20), nn.BatchNorm2d(20), nn.ReLU(), conv(20, 40, 1)),
    "pooling": nn.Sequential(conv(3, 20, 2), nn.MaxPool2d(3, 2, 1), nn.ReLU(), conv(20, 33, 1), nn.MaxPool2d(2)),
    "pooling in place of size": nn.Sequential(conv(3, 20), nn.MaxPool2d(3, 1, 1), nn.ReLU(), conv(20, 33)),
    "odd windows": nn.Sequential(conv(3, 20, 5, 2), nn.ReLU(), nn.Conv2d(20, 17, 2, 2, 1), nn.Conv2d(17, 70, 2)),
    "even strides": nn.Sequential(conv(3, 20), nn.Identity(), nn.Dropout(), conv(20, 20, 3, 2), conv(20, 20, 1, 2)),
    "a valid convolution": nn.Sequential(conv(3, 70), nn.Conv2d(70, 16, 3, padding="valid"), conv(16, 16)),
    "branches": Stage(
        lambda s, x: s.c(s.b(y := s.a(x))) + s.d(y),
        a=conv(3, 20), b=conv(20, 8, 3, 2), c=conv(8, 20), d=conv(20, 20, 1, 2),
    ),
    **{
        f"{name} {more}": nn.Sequential(conv(3, 17), nn.BatchNorm2d(17), layer, conv(17, 24, 1))
        for layer in (nn.SiLU(), nn.Hardswish(inplace=True), nn.ReLU6(), nn.GELU(), nn.Sigmoid(), nn.Hardsigmoid())
        for name, more in [(type(layer).__name__, "fused")]
    },
    "activations of what is no sum": nn.Sequential(
        conv(3, 20), nn.MaxPool2d(2), nn.SiLU(), nn.BatchNorm2d(20), nn.GELU(), nn.ReLU(), conv(20, 20)
    ),
    **{
        f"depthwise {kernel}×{kernel}, stride {stride}": nn.Sequential(
            conv(3, 17), nn.ReLU6(), conv(17, 17, kernel, stride, groups=17), nn.BatchNorm2d(17), nn.Hardswish()
        )
        for kernel, stride in ((3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (1, 1), (2, 2), (4, 1))
    },
    **{
        f"{groups} groups of {inputs} and {outputs}": nn.Sequential(
            conv(3, groups * inputs), conv(groups * inputs, groups * outputs, kernel, stride, groups=groups), nn.SiLU()
        )
        for groups, inputs, outputs, kernel, stride in (
            (8, 4, 4, 3, 1), (3, 8, 8, 3, 2), (2, 16, 16, 1, 1), (2, 32, 64, 3, 1), (3, 24, 24, 3, 1), (5, 1, 3, 3, 2),
            (3, 7, 5, 5, 1), (2, 40, 1, 3, 1), (2, 5, 33, 2, 1),
        )
    },
    **{
        f"gate by {way}": nn.Sequential(conv(3, 33), Gate(33, 5, nn.SiLU(), gate, way), nn.ReLU(), conv(33, 20, 1))
        for way, gate in (("module", nn.Sigmoid()), ("mean", nn.Hardsigmoid()), ("linear", nn.Sigmoid()))
    },
    "dense, whole blocks": Stage(dense, **dense_layers(32, 16)),
    "dense, parts of blocks": Stage(dense, **dense_layers(17, 5)),
    "joined in two orders": Stage(
        lambda s, x: s.c(torch.cat([y := s.a(x), z := s.b(x)], 1)) + s.d(torch.cat([z, y, z], 1)).relu(),
        a=conv(3, 16), b=conv(3, 5), c=conv(21, 20), d=conv(26, 20),
    ),
    "joined and extended twice": Stage(
        lambda s, x: s.e(torch.cat([s.n(torch.cat([y := s.a(x), z := s.b(x)], 1)).relu(),
                                    s.m(torch.cat([y, z, s.c(y)], 1)), s.o(torch.cat([y, z, s.d(z)], 1))], dim=1)),
        a=conv(3, 16), b=conv(3, 16), c=conv(16, 16), d=conv(16, 32), n=nn.BatchNorm2d(32), m=nn.BatchNorm2d(48),
        o=nn.BatchNorm2d(64), e=conv(144, 9),
    ),
    "additions of what is no convolution": Stage(
        lambda s, x: s.c((s.a(x).relu() + F.silu(y := s.b(x))).sigmoid() + y.relu()),
        a=conv(3, 20), b=conv(3, 20), c=conv(20, 17),
    ),
    "mean pooling": nn.Sequential(conv(3, 17), nn.AvgPool2d(2), conv(17, 20), nn.AvgPool2d(3, 1, 1)),
    "an affine residual": Stage(
        lambda s, x: s.b(y := s.a(x)) + s.c(y), a=conv(3, 20), b=conv(20, 20), c=nn.BatchNorm2d(20)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CUSTOM)
@pytest.mark.sampled(25)
def test_custom_stages(name: str) -> None:
    check(network(CUSTOM[name], conv(network(CUSTOM[name]).heads[0].num_features, 24)), images(9, SHAPE))


@pytest.mark.parametrize("bias", [False, True])
def test_a_tail_of_one_pixel(bias: bool) -> None:
    """As `attach` makes it of backbones that end in more than one linear."""
    layers = {"a": conv(3, 20), "p": nn.AdaptiveAvgPool2d(1), "l": nn.Linear(20, 37, bias), "h": nn.Hardswish()}
    tail = Stage(lambda s, x: s.h(s.l(torch.flatten(s.p(s.a(x)), 1))).reshape(-1, 37, 1, 1), **layers)
    check(network(tail), images(4, SHAPE), convolution=2, affine=0, mean=1)


@pytest.mark.parametrize("relu", RELUS)
def test_spellings_of_relu(relu: str) -> None:
    """Of a map that a later layer reads too: it reads the ReLU's result where that is in place."""
    layers = {"a": conv(3, 20), "b": conv(20, 20), "relu": nn.ReLU(), "relu_in_place": nn.ReLU(inplace=True)}
    check(
        network(Stage(lambda s, x: s.b(RELUS[relu](s, y := s.a(x))) + y, **layers)),
        images(4, SHAPE),
        affine=int("in place" not in relu),
    )


def test_a_head_that_writes_over_what_the_next_stage_reads() -> None:
    net = network(conv(3, 20), conv(20, 20))
    net.heads[0].convs = nn.Sequential(nn.ReLU(inplace=True))
    with pytest.raises(UnsupportedError, match="the head of exit 0 writes over the features, which the next stage"):
        lower(net)
    net.heads[0].convs = nn.Sequential(nn.ReLU())
    check(net, images(4, SHAPE))


@pytest.mark.parametrize("addition", ADDITIONS)
def test_spellings_of_addition(addition: str) -> None:
    layers = {"a": conv(3, 20), "b": conv(20, 20), "drop": nn.Dropout2d()}
    add = ADDITIONS[addition]
    stage = Stage(lambda s, x: s.b(add(s.b(y := s.drop(s.a(x))), y)), **layers)
    if "alpha" in addition:
        with pytest.raises(UnsupportedError, match="stage 0 has add with alpha"):
            lower(network(stage))
    else:
        check(network(stage), images(4, SHAPE), convolution=3, affine=0)


@pytest.mark.parametrize("head", ["pool", "bnpool", "conv2"])
def test_blocks_as_in_torchvision(head: str) -> None:
    """BatchNorms, additions and ReLUs go into the convolutions."""
    stem = nn.Sequential(conv(3, 16, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True), BasicBlock(16, 16, 1))
    stages = [stem, nn.Sequential(BasicBlock(16, 40, 2), BasicBlock(40, 40, 1)), BasicBlock(40, 64, 1)]
    check(network(*stages, head=head), images(9, SHAPE), convolution=11 + 3 * 2 * (head == "conv2"), affine=0, exit=3)


@pytest.mark.parametrize(("name", "shape"), [("eenet20", (1, 13, 13)), ("eenet8", (2, 9, 9))])
def test_zoo(name: str, shape: tuple[int, int, int]) -> None:
    net = lived_in(zoo.eenet(name, 2, input_shape=shape), 1)
    check(net, images(5, shape), exit=3)
    # Other sizes of images need no other steps.
    check(net, images(5, (shape[0], 17, 11)))


def test_maps_are_used_again() -> None:
    """EENet-44 has 43 convolutions, but never more than three maps of one size in use."""
    lowered = lower(zoo.eenet("eenet44", 2))
    assert len(lowered.layers) > 43
    assert max(sum(section == s for _, section in lowered.maps) for s in range(3)) <= 3
    assert lowered.sizes == ((32, 32), (16, 16), (8, 8))


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if len(x) > 0 else x


def after(layer: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 8), layer)


GROUPED = r"Conv2d\(8, 8.*groups=4.*the resident engine has no grouped, dilated or larger-stride one"
REFUSED = {
    "a grouped image": (conv(3, 6, groups=3), r"stage 0 has Conv2d\(3, 6.*no grouped, .* one of the image"),
    "dilated": (after(conv(8, 8, dilation=2)), r"stage 0 has Conv2d\(8, 8.*dilation=\(2, 2\).*no grouped, dilated"),
    "stride 3": (after(conv(8, 8, 3, 3)), r"stage 0 has Conv2d\(8, 8.*stride=\(3, 3\).*no grouped, dilated"),
    "oblong": (after(nn.Conv2d(8, 8, (3, 1), padding=(1, 0))), r"stage 0 has Conv2d\(8, 8, kernel_size=\(3, 1\)"),
    "reflecting": (after(conv(8, 8, padding_mode="reflect")), r"stage 0 has Conv2d\(8, 8.*padding_mode=reflect"),
    "untraceable": (Untraceable(), r"stage 0 is not folded: torch\.fx cannot trace it \("),
    "softplus": (after(nn.Softplus()), r"has Softplus\(.*\), which the resident engine has no step for \(at 1\)"),
    "GELU by tanh": (after(nn.GELU("tanh")), r"stage 0 has GELU\(approximate='tanh'\), which"),
    "mean with a divisor": (after(nn.AvgPool2d(2, divisor_override=3)), r"stage 0 has AvgPool2d\(.*, which"),
    "mean inside the edge": (after(nn.AvgPool2d(3, 1, 1, count_include_pad=False)), r"stage 0 has AvgPool2d\("),
    "mean in strides of 3": (after(nn.AvgPool2d(3)), r"stage 0 has AvgPool2d\("),
    "means of two by two": (after(nn.AdaptiveAvgPool2d(2)), r"stage 0 has AdaptiveAvgPool2d\("),
    "product of maps": (Stage(lambda s, x: s.a(x) * s.b(x), a=conv(3, 8), b=conv(3, 8)), r"stage 0 has mul, which"),
    "rows joined": (
        Stage(lambda s, x: torch.cat([s.a(x), s.b(x)], 2), a=conv(3, 8), b=conv(3, 8)), r"something else than channels"
    ),
    "the image joined": (Stage(lambda s, x: torch.cat([s.a(x), x], 1), a=conv(3, 8)), r"concatenation of the image"),
    "a number joined": (
        Stage(lambda s, x: torch.cat([s.a(x), torch.ones(1, 8, 9, 8)], 1), a=conv(3, 8)), r"stage 0 computes with"
    ),
    "ceiling": (after(nn.MaxPool2d(2, ceil_mode=True)), r"stage 0 has MaxPool2d\(.*ceil_mode=True"),
    "dilated pooling": (after(nn.MaxPool2d(2, dilation=2)), r"stage 0 has MaxPool2d\(.*dilation=2"),
    "pooled image": (nn.MaxPool2d(2), r"stage 0 has MaxPool2d"),
    "normalised image": (nn.Sequential(nn.BatchNorm2d(3), conv(3, 8)), r"stage 0 has BatchNorm2d\(3"),
    "ReLU of the image": (nn.Sequential(nn.ReLU(), conv(3, 8)), r"stage 0 has ReLU\(\)"),
    "function": (Stage(lambda s, x: torch.tanh(s.a(x)), a=conv(3, 8)), r"stage 0 has tanh, which"),
    "parameter": (Stage(lambda s, x: s.a(x) * 2, a=conv(3, 8)), r"stage 0 has mul, which"),
    "number added": (Stage(lambda s, x: s.a(x) + 1, a=conv(3, 8)), r"stage 0 has add, which"),
    "scaled addition": (
        Stage(lambda s, x: torch.add(s.b(y := s.a(x)), y, alpha=2), a=conv(3, 8), b=conv(8, 8)),
        r"stage 0 has add with alpha",
    ),
    "broadcast addition": (
        Stage(lambda s, x: s.b(y := s.a(x)) + s.c(y), a=conv(3, 8), b=conv(8, 8), c=conv(8, 1)),
        r"stage 0 adds maps of different channels",
    ),
    "added to a resizing layer": (
        Stage(
            lambda s, x: s.d(y := s.a(x)) + s.c(s.b(y)).relu(),
            a=conv(3, 8), b=conv(8, 8, 3, 2), c=conv(8, 8), d=conv(8, 8, 1, 2),
        ),
        r"an addition to a layer that resizes maps needs the result of later layers",
    ),
    "nothing": (nn.Identity(), r"exit 0 reads the image itself"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    stage, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=message):
        lower(network(stage))


ONLY_ON_THE_CPU = {
    "grouped": (after(conv(8, 8, groups=4)), f"stage 0 has {GROUPED}"),
    "sigmoid": (after(nn.Sigmoid()), r"stage 0 has Sigmoid\(\), which the resident engine has no step for"),
    "mean pooling": (after(nn.AvgPool2d(2)), r"stage 0 has AvgPool2d\(.*, which the resident engine has no step for"),
    "global mean": (after(nn.AdaptiveAvgPool2d(1)), r"stage 0 has AdaptiveAvgPool2d\(.*, which the resident"),
    "function": (Stage(lambda s, x: F.gelu(s.a(x)), a=conv(3, 8)), r"stage 0 has gelu, which"),
    "concatenation": (Stage(lambda s, x: torch.cat([s.a(x), s.a(x)], 1), a=conv(3, 8)), r"stage 0 has cat"),
    "no convolution added": (
        Stage(lambda s, x: s.a(x).relu() + s.b(x).relu(), a=conv(3, 8), b=conv(3, 8)),
        r"an addition follows no convolution whose result is used only there",
    ),
}


@pytest.mark.parametrize("name", ONLY_ON_THE_CPU)
def test_what_other_devices_and_int8_lack_is_refused_for_them(name: str) -> None:
    stage, message = ONLY_ON_THE_CPU[name]
    net = network(stage)
    lower(net)
    with pytest.raises(UnsupportedError, match=message):
        lower(net, every_step=False)


def test_foreign_head() -> None:
    class Head(ExitHead):
        def forward(self, features: Tensor) -> ExitOutput:
            return super().forward(-features)

    head = Head("pool", (8, 9, 8), 5, SHAPE)
    net = eefast.EarlyExitNet([conv(3, 8)], [head], input_shape=SHAPE)
    with pytest.raises(UnsupportedError, match=r"the head of exit 0 is a Head, not an eefast\.heads\.ExitHead"):
        lower(net)


def test_lowering_leaves_the_network_alone() -> None:
    net = network(BasicBlock(3, 8, 2), BasicBlock(8, 8, 1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    lower(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
