"""Small backbones whose forward a test writes, and the claim that exits attached to a backbone change no answer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from networks import lived_in
from torch import Tensor, nn

import eefast

SMALL = (3, 17, 15)


@torch.no_grad()
def assert_answers_of(net: eefast.EarlyExitNet, backbone: nn.Module, x: Tensor) -> None:
    """The final exit alone answers bit for bit as the backbone."""
    none_exits = net.with_criterion("max_probability", [float("inf")] * net.num_exits).eval()
    assert torch.equal(none_exits(x).logits, backbone.eval()(x))
    assert torch.equal(net.plain().eval()(x), backbone(x))


class Custom(nn.Module):
    """A forward given by the test around a few layers; most tests change one thing about it."""

    def __init__(self, forward: Callable[..., Tensor] | None = None, **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward or plain
        self.first, self.norm, self.relu = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.second, self.third = nn.Conv2d(8, 8, 3, 2, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain(m: Custom, x: Tensor) -> Tensor:
    return m.fc(torch.flatten(m.pool(m.third(m.second(m.relu(m.norm(m.first(x)))))), 1))


def in_place(m: Custom, x: Tensor) -> Tensor:
    """Statements whose values are never read, and additions that other names of the same map see."""
    x = m.second(m.first(x))
    same = m.relu(x)
    x += m.third(x)
    m.relu(x)
    x = m.fc(m.pool(same).view(same.size(0), -1) * 2)
    return x


def checked(m: Custom, x: Tensor) -> Tensor:
    """What torch.fx cannot trace."""
    if x.shape[-1] < 4:
        raise ValueError("too small")
    return plain(m, x)


def residual(m: Custom, x: Tensor) -> Tensor:
    x = m.second(m.first(x))
    return m.fc(m.pool(x + m.third(x)).flatten(1))


def make(forward: Callable[..., Tensor] | None = None, **layers: nn.Module) -> Custom:
    return lived_in(Custom(forward, **layers), 5)
