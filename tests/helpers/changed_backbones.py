"""A small backbone and what people do to modules: parts used twice, frozen, pruned, hooked, with odd attributes."""

import threading

import pytest
import torch
from networks import images, lived_in
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from eefast.heads import ExitHead

SHAPE = (3, 13, 11)


class Backbone(nn.Module):
    """Images → first → second → third → 5 logits."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.third = nn.Sequential(nn.Conv2d(8, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.3))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.third(self.second(self.first(x))).mean((2, 3)))


def as_it_is(b):
    pass


def block_twice(b):
    b.third = nn.Sequential(b.third[0], b.second, b.second, b.third[2])


def norm_twice(b):
    b.third = nn.Sequential(b.third[0], b.third[1], nn.Conv2d(8, 8, 1), b.third[1])


def two_names(b):
    b.layers = nn.ModuleList([b.first, b.second, b.third])


def tied_weights(b):
    b.second[0].weight = b.third[0].weight


def frozen_parts(b):
    b.requires_grad_(False)
    b.fc.requires_grad_(True)
    b.train()
    b.first.eval()


def with_gradients(b):
    b.train()
    b(images(4, SHAPE)).sum().backward()


def weight_norm(b):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(b.second[0])
    with_gradients(b)


def spectral_norm(b):
    nn.utils.spectral_norm(b.second[0])
    with_gradients(b)


def pruned(b):
    from torch.nn.utils import prune

    prune.l1_unstructured(b.second[0], "weight", 0.3)
    with_gradients(b)


def parametrized(b):
    parametrizations.weight_norm(b.second[0])
    parametrizations.spectral_norm(b.third[0])
    with_gradients(b)


def user_parametrization(b):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(b.second[0], "weight", Twice())


def hooked(b):
    seen = []
    b.second.register_forward_hook(lambda module, x, y: seen.append(b.fc.weight.sum()) or y * 1.5)
    b.third.register_forward_pre_hook(lambda module, x: (x[0] + b.fc.bias.sum(),))
    b.seen = seen


def without_statistics(b):
    b.second[1] = nn.BatchNorm2d(8, track_running_stats=False)
    b.third[1] = nn.BatchNorm2d(8, affine=False)


def with_a_lock(b):
    b.second.lock = threading.Lock()
    b.second.of = (threading.Lock(), b.second)
    b.second.generator = (i for i in range(3))


class Counting(nn.Module):
    """Writes to buffers, attributes and even weights in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.weight, self.sizes = nn.Parameter(torch.ones(1)), []

    def forward(self, x):
        with torch.no_grad():
            self.calls += 1
            self.weight.mul_(1.0)
            self.weight.org = self.weight.data
        self.last, _ = x.shape[1], self.sizes.append(x.shape)
        return x * self.weight


def counting(b):
    b.second.append(Counting())


class Drawing(nn.Module):
    def forward(self, x):
        torch.rand(3)
        return x


def drawing(b):
    b.second.append(Drawing())


def partly_float64(b):
    b.register_buffer("table", torch.arange(3).double())
    b.scale = torch.full((2,), 0.5).bfloat16()


def meta(b):
    b.to("meta")


SIMPLE = [
    as_it_is, block_twice, norm_twice, two_names, tied_weights, frozen_parts, with_gradients, weight_norm,
    spectral_norm, pruned, parametrized, user_parametrization, hooked, without_statistics, with_a_lock, counting,
    drawing, partly_float64,
]  # fmt: skip


def backbone(change):
    torch.manual_seed(3)
    made = lived_in(Backbone(), 4)
    change(made)
    return made


def stages_and_heads(b):
    stages = [b.first, b.second, b.third]
    return stages, [ExitHead("bnpool" if i < 2 else "pool", (8, 13, 11), 5, SHAPE) for i in range(3)]
