"""Random networks of every shape that users build, each from one number: layers, heads, exits, weights."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from networks import Stage, lived_in
from torch import Tensor, nn
from torch.nn import functional as F

import eefast
from eefast.criteria import CRITERIA
from eefast.heads import ExitHead
from eefast.result import ExitOutput
from eefast.surgery.attachment import attach

HEADS = ("pool", "bnpool", "plain", "conv1", "conv2")
CLASSES = (1, 2, 3, 10, 31)


def network(seed: int) -> tuple[eefast.EarlyExitNet, nn.Module | None]:
    """A network in eval mode and, where it was cut out of a backbone, that backbone."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = rng.choices((_zoo, _from_stages, _attached), weights=(3, 5, 3))[0]
        net, backbone = make(rng)
    return lived_in(net, seed), backbone if backbone is None else backbone.eval()


def _shape(rng: random.Random) -> tuple[int, int, int]:
    return rng.choice((1, 2, 3, 4)), rng.randint(7, 18), rng.randint(7, 18)


def _normalization(rng: random.Random, channels: int) -> tuple[list[float], list[float]] | None:
    if rng.random() < 0.3:
        return None
    return [rng.uniform(0.2, 0.6) for _ in range(channels)], [rng.uniform(0.15, 0.4) for _ in range(channels)]


def _zoo(rng: random.Random) -> tuple[eefast.EarlyExitNet, None]:
    shape, head = _shape(rng), rng.choice(HEADS)
    if rng.random() < 0.4:
        name, exits, more = "eenet8", 2, {"filters": rng.choice((1, 2, 3, 5, 16))}
        head = "pool" if head == "plain" else head
    else:
        name, more = "eenet20", {}
        exits = rng.randint(1, 2 if head == "plain" else 4)
    net = eefast.zoo.eenet(
        name,
        exits,
        "fine" if head == "plain" else rng.choice(("fine", "pareto", "linear", "gold_ratio")),
        head,
        num_classes=rng.choice(CLASSES),
        input_shape=shape,
        normalization=_normalization(rng, shape[0]),
        criterion=rng.choice(list(CRITERIA)),
        **more,
    )
    return net, None


def _from_stages(rng: random.Random) -> tuple[eefast.EarlyExitNet, None]:
    shape = _shape(rng)
    channels, size, classes = shape[0], min(shape[1:]), rng.choice(CLASSES)
    stages, heads, probe = [], [], torch.randn(2, *shape)
    for i in range(rng.randint(1, 4)):
        parts = []
        for j in range(rng.randint(1, 3)):
            # Resident stages begin with a convolution of the image; others have any order.
            kind = "conv" if i == j == 0 and rng.random() < 0.8 else rng.choice(list(_PARTS))
            part, channels, size = _PARTS[kind](rng, channels, size)
            parts.append(part)
        stages.append(nn.Sequential(*parts) if len(parts) > 1 or rng.random() < 0.5 else parts[0])
        with torch.no_grad():
            probe = stages[-1].eval()(probe.clone())
        heads.append(_head(rng, tuple(probe.shape[1:]), classes, shape))
    net = eefast.EarlyExitNet(
        stages,
        heads,
        input_shape=shape,
        criterion=rng.choice(list(CRITERIA)),
        normalization=_normalization(rng, shape[0]),
    )
    return net, None


class OtherHead(nn.Module):
    """A head of a user: pools by the maximum, answers with a hidden layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.hidden, self.rows = nn.Linear(channels, 9), nn.Linear(9, classes + 1)

    def forward(self, x: Tensor) -> ExitOutput:
        rows = self.rows(torch.relu(self.hidden(x.amax(dim=(2, 3)))))
        logit = rows[:, -1].float()
        return ExitOutput(rows[:, :-1], torch.sigmoid(logit), logit)


def _head(rng: random.Random, features: tuple[int, ...], classes: int, shape: tuple[int, ...]) -> nn.Module:
    if rng.random() < 0.06:
        return OtherHead(features[0], classes)
    kinds = [kind for kind in HEADS if kind != "plain" or (features[1:] == shape[1:] and rng.random() < 0.3)]
    head = ExitHead(rng.choice(kinds), features, classes, shape)
    if head.kind != "plain" and rng.random() < 0.12:
        change = rng.choice(("pool", "norm", "classifier", "confidence", "convs"))
        if change == "pool":
            head.pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
        elif change == "norm":
            head.norm = nn.GroupNorm(1, features[0])
        elif change == "classifier":
            head.classifier = nn.Sequential(nn.Linear(features[0], 7), nn.Tanh(), nn.Linear(7, classes))
        elif change == "confidence":
            head.confidence = nn.Sequential(nn.ReLU(), nn.Linear(features[0], 1))
        else:
            head.convs = nn.Sequential(nn.Conv2d(features[0], features[0], 1), nn.GELU())
    return head


class Backbone(nn.Module):
    """Images → logits, with the tail that the drawn number says."""

    def __init__(self, blocks: list[nn.Module], channels: int, classes: int, tail: str, side: int) -> None:
        super().__init__()
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(channels, classes)
        self.avgpool: nn.Module = nn.AdaptiveAvgPool2d(1) if tail == "module" else nn.Identity()
        self.tail, self.side = tail, side

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.blocks(x))
        if self.tail == "mean":
            x = x.mean((2, 3))
        elif self.tail == "maximum":
            x = x.amax(dim=(2, 3))
        elif self.tail == "window":  # as backbones with a hard-coded window do, which keeps to one size of images
            x = F.adaptive_avg_pool2d(F.avg_pool2d(x, self.side), 1)
        return self.fc(torch.flatten(x, 1))


def _attached(rng: random.Random) -> tuple[eefast.EarlyExitNet, nn.Module]:
    shape = _shape(rng)
    channels, size, blocks = shape[0], min(shape[1:]), []
    depth = rng.randint(2, 4)
    for i in range(depth):
        # attach wants weights after its last exit.
        kind = "conv" if i in (0, depth - 1) else rng.choice([k for k in _PARTS if k != "view"])
        block, channels, size = _PARTS[kind](rng, channels, size)
        blocks.append(block)
    twice = rng.random() < 0.15 and len(blocks) > 2
    if twice and _keeps(blocks[-2], channels) and any(True for _ in blocks[-2].parameters()):
        blocks[-1] = blocks[-2]
    tail = rng.choice(("module", "mean", "maximum", "window"))
    backbone = Backbone(blocks, _width(blocks, shape), rng.choice(CLASSES), tail, max(1, min(2, size)))
    lived_in(backbone, rng.randrange(2**31))
    once = [i for i in range(len(blocks) - 1) if sum(b is blocks[i] for b in blocks) == 1]
    exits = [f"blocks.{i}" for i in sorted(rng.sample(once, rng.randint(1, len(once))))]
    net = attach(
        backbone,
        exits,
        head=rng.choice(("pool", "bnpool", "conv1")),
        input_shape=shape,
        criterion=rng.choice(list(CRITERIA)),
        normalization=_normalization(rng, shape[0]),
    )
    return net, backbone


def _keeps(block: nn.Module, channels: int) -> bool:
    with torch.no_grad():
        try:
            return block.eval()(torch.zeros(2, channels, 9, 9)).shape[1] == channels
        except RuntimeError:
            return False


def _width(blocks: list[nn.Module], shape: tuple[int, int, int]) -> int:
    x = torch.zeros(2, *shape)
    with torch.no_grad():
        for block in blocks:
            x = block.eval()(x)
    return x.shape[1]


Made = tuple[nn.Module, int, int]
"""A part of a stage, the channels of its map, and the shorter side of that at least."""


def _norm_relu(rng: random.Random, channels: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    if rng.random() < 0.7:
        found.append(nn.BatchNorm2d(channels, affine=rng.random() < 0.9))
    if rng.random() < 0.7:
        found.append(nn.ReLU(inplace=rng.random() < 0.5))
    return found


def _conv(rng: random.Random, channels: int, size: int) -> Made:
    out, kernel = rng.choice((1, 3, 4, 8, 16, 17, 20)), rng.choice((1, 3, 3, 3, 5))
    stride = rng.choice((1, 1, 2)) if size >= 4 else 1
    padding = kernel // 2 if size < 6 or rng.random() < 0.8 else rng.randint(0, kernel // 2)
    conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=rng.random() < 0.5)
    return nn.Sequential(conv, *_norm_relu(rng, out)), out, (size + 2 * padding - kernel) // stride + 1


def _residual(rng: random.Random, channels: int, size: int) -> Made:
    out, stride = (channels, 1) if rng.random() < 0.5 or size < 4 else (rng.choice((8, 16, 20)), 2)
    shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
    layers = {
        "conv1": nn.Conv2d(channels, out, 3, stride, 1, bias=False),
        "bn1": nn.BatchNorm2d(out),
        "conv2": nn.Conv2d(out, out, 3, 1, 1, bias=False),
        "bn2": nn.BatchNorm2d(out),
        "shortcut": shortcut if (out, stride) != (channels, 1) else nn.Identity(),
    }
    run = rng.choice((_block, _block_in_place))
    return Stage(run, **layers), out, (size - 1) // stride + 1


def _block(m: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))) + m.shortcut(x))


def _block_in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x)), inplace=True)))
    y += m.shortcut(x)
    return y.relu_()


def _twice(m: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(m.norm(m.conv(torch.relu(m.norm(m.conv(x))))))


def _two_norms(m: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(m.norm(m.conv(x)) + m.other(m.conv(x)))


def _one_norm(m: nn.Module, x: Tensor) -> Tensor:
    return torch.relu(m.norm(m.other(m.norm(m.conv(x)))))


def _read_between(m: nn.Module, x: Tensor) -> Tensor:
    y = m.conv(x)
    return torch.relu(m.norm(y)) + y


def _reused(rng: random.Random, channels: int, size: int) -> Made:
    run = rng.choice((_twice, _two_norms, _one_norm, _read_between))
    conv, norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
    other = nn.Conv2d(channels, channels, 1) if run is _one_norm else nn.BatchNorm2d(channels)
    return Stage(run, conv=conv, norm=norm, other=other), channels, size


def _preactivation(rng: random.Random, channels: int, size: int) -> Made:
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), conv), channels, size


def _pooled(rng: random.Random, channels: int, size: int) -> Made:
    if size < 4:
        return nn.Identity(), channels, size
    pool = rng.choice((nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)))
    return pool, channels, size // 2


def _activation(rng: random.Random) -> nn.Module:
    return rng.choice((nn.SiLU(), nn.Hardswish(), nn.ReLU6(), nn.GELU(), nn.ReLU(), nn.Sigmoid(), nn.Identity()))


def _grouped(rng: random.Random, channels: int, size: int) -> Made:
    kernel, stride = rng.choice((1, 3, 3, 5, 7)), rng.choice((1, 1, 2)) if size >= 4 else 1
    groups = rng.choice([n for n in range(1, channels + 1) if channels % n == 0] + [channels] * 3)
    out = channels if groups == channels else groups * rng.choice((1, 2, 3, 8))
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, bias=rng.random() < 0.5)
    return nn.Sequential(conv, *_norm_relu(rng, out)[:1], _activation(rng)), out, (size - 1) // stride + 1


def _gate(m: nn.Module, x: Tensor) -> Tensor:
    return m.gate(m.second(m.active(m.first(m.pool(x))))) * x


def _gate_by_mean(m: nn.Module, x: Tensor) -> Tensor:
    return x * m.gate(m.second(m.active(m.first(x.mean((2, 3), keepdim=True)))))


def _gated(rng: random.Random, channels: int, size: int) -> Made:
    """Squeeze and excitation."""
    squeezed, gate = rng.choice((1, 4, 9)), rng.choice((nn.Sigmoid(), nn.Hardsigmoid()))
    layers = {"first": nn.Conv2d(channels, squeezed, 1), "second": nn.Conv2d(squeezed, channels, 1), "gate": gate}
    run = rng.choice((_gate, _gate_by_mean))
    return Stage(run, pool=nn.AdaptiveAvgPool2d(1), active=_activation(rng), **layers), channels, size


def _denser(m: nn.Module, x: Tensor) -> Tensor:
    maps = [m.stem(x)]
    for norm, conv in zip(m.norms, m.convs, strict=True):
        maps.append(conv(torch.relu(norm(torch.cat(maps, 1)))))
    return torch.cat(maps, 1)


def _dense(rng: random.Random, channels: int, size: int) -> Made:
    """DenseNet's block."""
    stem, growth, n = rng.choice((16, 32, 5)), rng.choice((16, 3)), rng.randint(1, 3)
    widths = [stem + i * growth for i in range(n)]
    norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
    convs = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths)
    return Stage(_denser, stem=nn.Conv2d(channels, stem, 1), norms=norms, convs=convs), stem + n * growth, size


def _twist(m: nn.Module, x: Tensor) -> Tensor:
    return x.mul(0.7).add_(0.1).clamp(-3, 3)


def _odd(rng: random.Random, channels: int, size: int) -> Made:
    choice = rng.choice((nn.GELU(), nn.LeakyReLU(0.1), nn.Dropout(0.5), nn.Identity(), nn.Hardswish(), Stage(_twist)))
    return choice, channels, size


def _joined(m: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([m.left(x), m.right(x)], dim=1)


def _branches(rng: random.Random, channels: int, size: int) -> Made:
    left, right = nn.Conv2d(channels, 5, 3, padding=1), nn.Conv2d(channels, 3, 1)
    return Stage(_joined, left=left, right=right), 8, size


def _shuffled(m: nn.Module, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return m.conv(x.view(n, c, h * w).roll(1, 1).view(n, c, h, w))


def _viewed(rng: random.Random, channels: int, size: int) -> Made:
    return Stage(_shuffled, conv=nn.Conv2d(channels, channels, 1)), channels, size


_PARTS: dict[str, Callable[[random.Random, int, int], Made]] = {
    "conv": _conv,
    "residual": _residual,
    "reused": _reused,
    "preactivation": _preactivation,
    "pooled": _pooled,
    "grouped": _grouped,
    "gated": _gated,
    "dense": _dense,
    "odd": _odd,
    "branches": _branches,
    "view": _viewed,
}
