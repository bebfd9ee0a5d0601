"""CUDA graphs simulated on the CPU: work → a replay of the operations recorded in it, on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "allclose")
"""Operations that make the host wait for the device, which a capture forbids."""


class CaptureError(RuntimeError):
    """What CUDA would refuse, or what would read or write memory that is no longer the graph's."""


@dataclass(frozen=True)
class _Outside:
    """A tensor that was there before the capture: a graph knows its address, and keeps it no longer than others do."""

    storage: StorageWeakRef
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, x: Tensor) -> _Outside:
        at = tuple(x.shape), x.stride(), x.storage_offset()
        return cls(StorageWeakRef(x.untyped_storage()), x.dtype, *at)

    def tensor(self, name: str) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise CaptureError(f"a replay uses a tensor of {self.size} in {name} that was freed after the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)

    def renewed(self, result: Tensor) -> Tensor:
        """What a replay returned, at the address of the capture where that tensor is still held."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None or storage.data_ptr() == result.untyped_storage().data_ptr():
            return result
        return self.tensor("a result").copy_(result)


@dataclass(frozen=True)
class _Inside:
    """The result of an operation of the graph: in the graph's pool, undefined before it is written again."""

    number: int


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[int | None]]] = []
        self._known: dict[int, int] = {}
        self._made: list[Tensor] = []  # alive until the capture ends, so that no other tensor has the identity of one
        self._of_the_pool: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x.dtype == torch.bool for x in _tensors(args[1]))
        if name in READS or by_mask:
            raise CaptureError(f"{name} waits for the device: operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        self._keep_what_is_written(func, args, kwargs)
        recorded = tree_map_only(Tensor, self._reference, (args, kwargs))
        results = func(*args, **kwargs)
        numbers = [self._number(x) for x in _tensors(results)]
        self.calls.append((func, *recorded, numbers))
        return results

    def undo(self) -> None:
        """A capture runs nothing: what its operations have written here is as before."""
        for whole, before in self._before.values():
            whole.copy_(before)

    def _reference(self, x: Tensor) -> _Inside | _Outside:
        if id(x) in self._known:
            return _Inside(self._known[id(x)])
        if x.untyped_storage()._cdata in self._of_the_pool:
            raise CaptureError("a tensor of the graph was made by what is no recorded operation")
        return _Outside.of(x)

    def _number(self, x: Tensor) -> int:
        if id(x) not in self._known:
            self._known[id(x)] = len(self._made)
            self._made.append(x)
            if x.untyped_storage()._cdata not in self._before:
                self._of_the_pool.add(x.untyped_storage()._cdata)
        return self._known[id(x)]

    def _keep_what_is_written(self, func: Any, args: Any, kwargs: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))

    def _keep(self, argument: Any, value: Any) -> None:
        written = argument.alias_info is not None and argument.alias_info.is_write
        for x in _tensors(value) if written else []:
            storage = x.untyped_storage()
            if id(x) not in self._known and storage._cdata not in self._before | dict.fromkeys(self._of_the_pool):
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage._cdata] = whole, whole.clone()


def _tensors(values: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    tree_map_only(Tensor, found.append, values)
    yield from found


def recorded(work: Callable[[], None], fill: Callable[[], None], pool: Any) -> Callable[[], None]:
    """What `eefast.engines.graphs.captured` returns on a GPU: a replay that knows addresses, and no Python.

    The capture itself changes no memory. Numbers that Python took are those of the capture for ever; what an operation
    of the graph returned is made again, and undefined until then; where Python still holds it, at its address. Raises
    `CaptureError` where the work makes the host wait, and at a replay that uses memory which was freed after the
    capture.
    """
    work()
    fill()
    with _Recorder() as recorder:
        work()
    recorder.undo()
    calls, results_of_capture = recorder.calls, [_Outside.of(x) for x in recorder._made]
    del recorder

    def replay() -> None:
        made: dict[int, Tensor] = {}

        def tensor(of: Any, name: str) -> Any:
            if isinstance(of, _Inside):
                return made[of.number]
            return of.tensor(name) if isinstance(of, _Outside) else of

        with torch.no_grad():
            for func, args, kwargs, numbers in calls:
                given = tree_map_only((_Inside, _Outside), lambda x, func=func: tensor(x, str(func)), (args, kwargs))
                results = func(*given[0], **given[1])
                for number, result in zip(numbers, _tensors(results), strict=True):
                    assert number is not None
                    made[number] = results_of_capture[number].renewed(result)

    return replay
