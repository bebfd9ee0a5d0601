"""Module → a copy of its whole tree, whatever it holds, in which modules and tensors are the copy's alone."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


class TreeCopy:
    """A copy of a module tree for private use; `of(root)` is its root.

    tensor: makes the copy of a tensor; without it tensors are shared.
    Every module is copied with its attributes. Unlike `copy.deepcopy`, this works whatever they hold (locks, hooks,
    weights that are no leaves of autograd): what is neither a module nor a list, tuple, dictionary, method, partial or
    closure with modules in it is shared. A dictionary that another thread changes meanwhile does no harm. Modules
    compiled by torch.compile run uncompiled.
    """

    def __init__(self, root: nn.Module, tensor: Callable[[Tensor], Tensor] | None = None) -> None:
        self._copy_tensor = tensor
        # By id; the originals are kept, so that no other object can get the same id.
        self._copies: dict[int, tuple[Any, Any]] = {}
        modules = list(root.modules())
        for module in modules:
            self._keep(module, self._script(module) if _is_script(module) else object.__new__(type(module)))
        for module in modules:
            if not _is_script(module):
                self._fill(module, self.of(module))

    def of(self, value: Any, whole: bool = False) -> Any:
        """The copy of a value; the value itself where it holds nothing that was copied.

        whole: copy a container in any case.
        """
        if id(value) in self._copies:
            return self._copies[id(value)][1]
        if isinstance(value, Tensor):
            return value if self._copy_tensor is None else self._keep(value, self._copy_tensor(value))
        kind = type(value)
        if kind is list or kind in (dict, OrderedDict, defaultdict):
            return self._container(value, whole)
        if kind is tuple:
            parts = tuple(map(self.of, value))
            return self._keep(value, parts) if any(a is not b for a, b in zip(parts, value, strict=True)) else value
        if kind is MethodType:
            function, owner = self.of(value.__func__), self.of(value.__self__)
            unchanged = function is value.__func__ and owner is value.__self__
            return value if unchanged else self._keep(value, MethodType(function, owner))
        if kind is partial:
            parts = value.func, value.args, tuple(value.keywords.items())
            copied = self.of(parts)
            return value if copied is parts else self._keep(value, partial(copied[0], *copied[1], **dict(copied[2])))
        return self._function(value) if kind is FunctionType else value

    def _keep(self, value: Any, copied: Any) -> Any:
        self._copies[id(value)] = value, copied
        return copied

    def _script(self, module: nn.Module) -> nn.Module:
        return _CallsOriginal(module) if self._copy_tensor is None else copy.deepcopy(module)

    def _container(self, value: Any, whole: bool) -> Any:
        copied = self._keep(value, value.copy())
        places = list(copied.items()) if isinstance(copied, dict) else list(enumerate(copied))
        changed = whole
        for place, item in places:
            copied[place] = self.of(item)
            changed |= copied[place] is not item
        return copied if changed else self._keep(value, value)

    def _fill(self, module: nn.Module, copied: nn.Module) -> None:
        state = module.__dict__.copy()
        for cls in type(module).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(module, name) and name not in ("__dict__", "__weakref__"):
                    object.__setattr__(copied, name, self.of(getattr(module, name)))
        state.pop("_compiled_call_impl", None)
        copied.__dict__.update({name: self.of(value, whole=True) for name, value in state.items()})
        if type(module).__name__ == "OptimizedModule":
            copied.__dict__["forward"] = copied._orig_mod

    def _function(self, function: FunctionType) -> FunctionType:
        self._keep(function, function)  # it may be in its closure
        cells = tuple(map(self._cell, function.__closure__ or ()))
        variables = self.variables(function)
        if cells == (function.__closure__ or ()) and variables is function.__globals__:
            return function
        made = FunctionType(function.__code__, variables, function.__name__, function.__defaults__, cells)
        made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
        made.__dict__.update(function.__dict__)
        return self._keep(function, made)

    def _cell(self, cell: CellType) -> CellType:
        try:
            value = cell.cell_contents
        except ValueError:  # empty
            return cell
        copied = self.of(value)
        return cell if copied is value else CellType(copied)

    def variables(self, function: FunctionType) -> dict[str, Any]:
        """The global variables with which a copied function runs."""
        return function.__globals__


def _is_script(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)


class _CallsOriginal(nn.Module):
    """In place of a copy of a TorchScript module, which has no Python attributes to copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["original"](*args, **kwargs)
