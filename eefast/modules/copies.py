"""Copies of modules to try things on, so that nothing ever happens to the modules that were handed in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .tracing import Twins

M = TypeVar("M", bound=nn.Module)


def twin(module: M, device: torch.device | str | None = None) -> M:
    """A copy of `module` with tensors of its own; with device="meta" they take no memory.

    Raises `ValueError` for parameters that have no shape yet.
    """

    def copied(t: Tensor) -> Tensor:
        if is_lazy(t):
            raise ValueError("a parameter has no shape yet (a lazy module); run the network on one image first")
        if device is None:
            made = t.detach().clone()
        else:
            # Without its values, unless it is laid out in a special way.
            made = torch.empty_like(t.detach(), device=device) if t.layout == torch.strided else t.detach().to(device)
        if isinstance(t, nn.Parameter) and not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, requires_grad=t.requires_grad)
        # Binarised layers keep their real weights as an attribute of the parameter.
        more = {key: copied(value) if isinstance(value, Tensor) else value for key, value in vars(t).items()}
        made.__dict__.update(more)
        return made

    with torch.inference_mode(False), torch.no_grad():
        return _Whole(module, copied).of(module)


def special_kind(t: Tensor) -> str:
    """The class of a tensor that computes in a way of its own (DTensor, FakeTensor), "" for all others."""
    kind = type(t.data if type(t) is nn.Parameter else t)
    return kind.__name__ if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ else ""


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Every module's flag comes back afterwards, since some of them may be frozen."""
    flags = [(m, m.training) for m in module.modules()]
    for m, _ in flags:
        m.training = training
    try:
        yield
    finally:
        for m, flag in flags:
            m.training = flag


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """No gradients, inference mode or autocast of the caller's."""
    kind = device.type if device.type in ("cpu", "cuda") else "cpu"
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(kind, enabled=False):
        yield


@contextmanager
def same_randomness(device: torch.device) -> Iterator[None]:
    """What is drawn from the global generators inside is drawn again afterwards, also by other threads."""
    import numpy

    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


class _Whole(Twins):
    """Twins also of modules that are not registered; compiled and data-parallel ones can be traced."""

    def of(self, value: Any, whole: bool = False) -> Any:
        if isinstance(value, nn.Module) and id(value) not in self._copies:
            copied = self._keep(value, object.__new__(type(value)))
            self._fill(value, copied)
        return super().of(value, whole)

    def _fill(self, module: nn.Module, copied: nn.Module) -> None:
        super()._fill(module, copied)
        if type(module).__name__ == "OptimizedModule" or type(module) is nn.DataParallel:
            copied.__dict__.pop("forward", None)
            copied.__class__ = _Unwrapped
            copied.training = module.training


class _Unwrapped(nn.Module):
    """What stands around another module, under the same names, without compiling or spreading the work."""

    def forward(self, images: Tensor) -> Any:
        (inner,) = self.children()
        return inner(images)
