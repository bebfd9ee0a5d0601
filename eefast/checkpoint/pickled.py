"""What a pickle holds after it was read: tensors, names and inert objects; values, which nothing runs."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .stored import quoted, view


class RefusedError(ValueError):
    """The file is whole, but names what no checkpoint needs, or holds more than is read."""


class Name:
    """The name of a class or function in a file; it is never looked up."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Inert:
    """In the place of an object of a class, or of a function's result: name, arguments and state, none of them used."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name, self.args, self.state = name, args, None


class Storage:
    """Numbers that tensors share. place: (first byte, bytes) in the file, which the old format says last."""

    __slots__ = ("count", "dtype", "key", "place")

    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count, self.place = key, dtype, count, (0, 0)


class Stored:
    """A dense tensor in a file: its shape is known, its place is checked when `tensor` is called."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> None:
        if not isinstance(storage, Storage) or not are_sizes((offset,)) or not are_sizes(shape):
            raise ValueError("it holds a tensor without storage or shape")
        if not are_sizes(stride) or len(stride) != len(shape):
            raise ValueError("it holds a tensor with wrong strides")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride
        self.dtype = storage.dtype if dtype is None else dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def tensor(self, data: bytearray) -> Tensor:
        """The tensor, a view of `data` where possible."""
        start, length = self.storage.place
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        if 0 not in self.shape and (last + 1) * self.dtype.itemsize > length:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage of {length} bytes")
        return view(data, self.dtype, start + self.offset * self.dtype.itemsize, self.shape, self.stride)


def are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**47 for v in value)


def attributes(thing: Inert) -> dict[str, Any]:
    """The attributes that `thing` was pickled with."""
    return thing.state if isinstance(thing.state, dict) else {}


def kind(value: Any) -> str:
    """What `value` is, in one or two words for a message."""
    if isinstance(value, Stored):
        return "a Tensor"
    if isinstance(value, Name):
        return f"the name {quoted(value.text)}"
    if isinstance(value, Inert):
        name = value.name.rpartition(".")[2]
        return f"a Tensor ({name})" if value.name.startswith("torch._utils._rebuild") else f"a {quoted(name)[1:-1]}"
    return f"a {type(value).__name__}"
