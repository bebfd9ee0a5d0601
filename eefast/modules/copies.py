"""Module → a copy to try things on, so that the module that was handed in never changes."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .tree_copy import TreeCopy

M = TypeVar("M", bound=nn.Module)


def working_copy(module: M, device: torch.device | str | None = None) -> M:
    """A copy of `module` that shares no tensor with it; with device="meta" the tensors take no memory.

    Modules compiled or made data-parallel are copied so that torch.fx can trace them.

    Raises `ValueError` for parameters that have no shape yet.
    """

    def copy_tensor(t: Tensor) -> Tensor:
        if is_lazy(t):
            raise ValueError("a parameter has no shape yet (a lazy module); run the network on one image first")
        if device is None:
            made = t.detach().clone()
        else:
            # Without its values, unless its layout is not strided.
            made = torch.empty_like(t.detach(), device=device) if t.layout == torch.strided else t.detach().to(device)
        if isinstance(t, nn.Parameter) and not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, requires_grad=t.requires_grad)
        # Binarised layers keep their real weights as an attribute of the parameter.
        more = {key: copy_tensor(value) if isinstance(value, Tensor) else value for key, value in vars(t).items()}
        made.__dict__.update(more)
        return made

    with torch.inference_mode(False), torch.no_grad():
        return _WorkingCopy(module, copy_tensor).of(module)


def special_kind(t: Tensor) -> str:
    """The class of a tensor that replaces what operations on it do (DTensor, FakeTensor), "" for all others."""
    kind = type(t.data if type(t) is nn.Parameter else t)
    return kind.__name__ if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ else ""


class _WorkingCopy(TreeCopy):
    """Also of modules that are not registered; compiled and data-parallel ones can be traced."""

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
    """A wrapper of another module, under the same names, that neither compiles nor distributes the work."""

    def forward(self, images: Tensor) -> Any:
        (inner,) = self.children()
        return inner(images)
