"""Notice that weights were changed after planning: by load_state_dict, an optimiser's step or new tensors."""

from __future__ import annotations

from itertools import chain
from operator import attrgetter, is_
from threading import RLock
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_pointers = Tensor.data_ptr
_versions = attrgetter("_version")


class WeightWatch:
    """Remembers every parameter, buffer and submodule of some modules as they were, and how many hooks there are.

    owner: a module whose submodules they are; that these stay, and its hooks, are watched too.

    Every in-place change through PyTorch raises a tensor's version, every exchange changes the tensor or its memory;
    fused optimisers raise no version, so their steps are listened to. Tensors made in inference mode have no version,
    and are compared with copies. Only writes that bypass version counters (`parameter.data.add_`, numpy views) stay
    unseen.

    compared: the number of bytes that every `changed` compares.
    """

    def __init__(self, *roots: nn.Module, owner: nn.Module | None = None) -> None:
        modules = [m for root in roots for m in root.modules()]
        owners = [] if owner is None else [owner]
        self._dicts: list[dict[str, Any]] = [m._modules for m in owners]
        self._empty: list[dict[str, Any]] = []
        for module in modules:
            tables: list[dict[str, Any]] = [module._parameters, module._buffers, module._modules]
            for table in tables:
                if table:
                    self._dicts.append(table)
                elif _may_fill(module):
                    self._empty.append(table)
        self._hooks = [d for m in (*owners, *modules) for d in (m._forward_hooks, m._forward_pre_hooks)]
        self._hooked = sum(map(len, self._hooks))
        self._entries = self._current()
        self._tensors = [t for t in self._entries if isinstance(t, Tensor)]
        self._tracked = [t for t in self._tensors if not t.is_inference()]
        self._untracked = [t for t in self._tensors if t.is_inference()]
        self._copies = [t.clone() for t in self._untracked]
        self.compared = sum(t.nbytes for t in self._copies)
        # The aliases keep the old memory alive, so that no new tensor can get the same address.
        self._aliases = [t.detach() for t in self._tensors]
        self._old_pointers = list(map(_pointers, self._tensors))
        self._old_versions = list(map(_versions, self._tracked))
        self._stepped = False
        _listen_to_optimisers()
        _watches[ref(self, _forget)] = None

    def changed(self) -> bool:
        """Whether anything is different from when the watch began."""
        current = self._current()
        return self._stepped or not (
            not any(self._empty)
            and len(current) == len(self._entries)
            and sum(map(len, self._hooks)) == self._hooked
            and all(map(is_, current, self._entries))
            and list(map(_pointers, self._tensors)) == self._old_pointers
            and list(map(_versions, self._tracked)) == self._old_versions
            and all(map(_same, self._untracked, self._copies))
        )

    def _current(self) -> list[Any]:
        return list(chain.from_iterable(d.values() for d in self._dicts))


def _may_fill(module: nn.Module) -> bool:
    """Whether an empty dictionary of it may get entries: not that of a layer of PyTorch's."""
    kind = type(module)
    return kind.__module__ == "torch.nn.modules.container" or not kind.__module__.startswith("torch.nn.")


def _same(a: Tensor, b: Tensor) -> bool:
    # The second question is slower, and only NaN makes a difference to it.
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


# Entries come and go in any thread, also while the garbage collector runs. Single operations on a dictionary are safe.
_watches: dict[ref[WeightWatch], None] = {}
_lock, _listening = RLock(), False


def _forget(watch: ref[WeightWatch]) -> None:
    _watches.pop(watch, None)


def _listen_to_optimisers() -> None:
    global _listening
    with _lock:
        if not _listening:
            register_optimizer_step_post_hook(_after_step)
            _listening = True


def _after_step(optimiser: Optimizer, args: Any, kwargs: Any) -> None:
    stepped = {id(p) for group in optimiser.param_groups for p in group["params"]}
    for watch in [reference() for reference in _watches.copy()]:
        if watch is not None and any(id(t) in stepped for t in watch._tensors):
            watch._stepped = True
