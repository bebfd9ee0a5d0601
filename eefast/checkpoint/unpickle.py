"""The bytes of a `torch.save` file → tensors and containers, without running anything of it; `state_dict` takes them.

The pickle is carried out here, by a machine that knows containers, numbers, texts and tensors. Every other class or
function that a file names becomes an `Inert`, so there is nothing that could run. Work and memory are limited: the
machine takes steps of constant size, at most `MOST_STEPS` of them, and a tensor is a view of the file's own bytes.
"""

from __future__ import annotations

import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from struct import unpack_from
from typing import Any

import torch
from torch import Tensor

from . import archive
from .stored import quoted, view

MOST_PICKLED = 8 << 20
MOST_STEPS = 500_000
"""Bytes and steps of a pickle, without the tensors' contents: each tensor takes 30 steps, whole modules take more."""
MOST_ODD_KEYS = 5_000

_ZIP, _PICKLE = b"PK\3\4", b"\x80"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class Name:
    """A class or function that a file names; nothing is ever looked up by it."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


class Inert:
    """Stand-in for an object of a class, or for the answer of a function: name, arguments and state do nothing."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: Any = ()) -> None:
        self.name, self.args, self.state = name, args, None


class _Storage:
    """Numbers that tensors share. place: (first byte, bytes) in the file, filled in late by the old format."""

    __slots__ = ("count", "dtype", "key", "place")

    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count, self.place = key, dtype, count, (0, 0)


class Stored:
    """A dense tensor in a file: its shape is known, its place checked once it is asked for as a `Tensor`."""

    __slots__ = ("dtype", "offset", "shape", "storage", "stride")

    def __init__(self, storage: Any, offset: Any, shape: Any, stride: Any, dtype: torch.dtype | None = None) -> None:
        if not isinstance(storage, _Storage) or not _are_sizes((offset,)) or not _are_sizes(shape):
            raise ValueError("it holds a tensor without storage or shape")
        if not _are_sizes(stride) or len(stride) != len(shape):
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


def _are_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**47 for v in value)


def check_start(start: bytes) -> None:
    """`ValueError` unless a file that begins so may be one of `torch.save`; start: its first 16 bytes."""
    if not start.startswith((_ZIP, _PICKLE)):
        what = "it is empty" if not start else f"it begins with {start[:8]!r}"
        raise ValueError(f"it is no file of torch.save, or a damaged one ({what}); copy or download it again")


def read(data: bytearray) -> Any:
    """What a file of `torch.save` holds: containers, numbers, texts, `Stored` tensors, and `Inert` for the rest.

    data: the file, in the zip format or in the one before torch 1.6. It may say that it is on a GPU.
    Raises `ValueError` for everything else: other formats, damaged files, names of code that no network needs.
    """
    check_start(bytes(data[:16]))
    try:
        return _read_zip(data) if data.startswith(_ZIP) else _read_legacy(data)
    except RefusedError:
        raise
    except Exception as error:  # a damaged file may lead to anything
        text = str(error).partition("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"it is no file of torch.save, or a damaged one ({text}); copy or download it again"
        ) from error


class RefusedError(ValueError):
    """The file is whole, but names what no checkpoint needs, or holds more than is read."""


def _read_zip(data: bytearray) -> Any:
    places = archive.entries(data)
    roots = [name[: -len("data.pkl")] for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise ValueError(f"it holds {len(roots)} entries called data.pkl")
    (root,) = roots
    if f"{root}constants.pkl" in places:
        raise RefusedError("it is a program of TorchScript; save the state_dict of the network that it was made of")
    if f"{root}byteorder" in places:
        start, size = places[f"{root}byteorder"]
        if bytes(data[start : start + size]) != b"little":
            raise RefusedError("it was written on a machine with another order of bytes; save it again on this kind")

    def find(storage: _Storage) -> None:
        place = places.get(f"{root}data/{storage.key}")
        if place is None or storage.count * storage.dtype.itemsize > place[1]:
            raise ValueError(f"the storage {quoted(storage.key)} is missing or shorter than it claims")
        storage.place = place

    start, size = places[f"{root}data.pkl"]
    machine = _Machine(data, start, start + size)
    content = machine.run()
    for storage in machine.storages.values():
        find(storage)
    return content


def _read_legacy(data: bytearray) -> Any:
    """Three pickled headers, the pickled object, the pickled list of its storages, and these."""
    machine = _Machine(data, 0, len(data))
    magic, protocol, system = machine.run(), machine.run(), machine.run()
    if magic != _MAGIC or protocol != _PROTOCOL or not isinstance(system, dict):
        raise ValueError("it is a pickle, but not one of torch.save")
    if system.get("little_endian") is not True:
        raise RefusedError("it was written on a machine with another order of bytes; save it again on this kind")
    content, keys = machine.run(), machine.run()
    if not isinstance(keys, list):
        raise ValueError("it does not list its storages")
    at = machine.at
    for key in keys:
        storage = machine.storages.get(key) if isinstance(key, str) else None
        (count,) = unpack_from("<q", data, at)
        if storage is None or storage.count != count or at + 8 + count * storage.dtype.itemsize > len(data):
            raise ValueError("a storage is cut off, or has another size than it claims")
        storage.place = at + 8, count * storage.dtype.itemsize
        at += 8 + count * storage.dtype.itemsize
    if any(not storage.place[0] for storage in machine.storages.values()):
        raise ValueError("a storage is missing")
    return content


_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}

# What a name is called for is decided by these lists alone. They exist to tell people about a file that wants to run
# something; since nothing can run, leaving a name out costs nobody's safety.
_MODULES = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple type",
    "collections": "Counter OrderedDict UserDict defaultdict deque",
    "copyreg": "_reconstructor __newobj__",
    "functools": "partial",
    "logging": "Logger getLogger",
    "re": "_compile",
    "time": "struct_time",
    "types": "SimpleNamespace",
    "_codecs": "encode",
    "torch": "Generator Size Tensor device dtype layout memory_format",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
    "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_parameter _rebuild_parameter_with_state "
    "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
    "_rebuild_wrapper_subclass",
    "torch.serialization": "_get_layout",
    "torch.torch_version": "TorchVersion",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
}
_NAMES = {f"{module}.{name}" for module, names in _MODULES.items() for name in names.split()}
_FREE = (
    *("argparse.", "datetime.", "decimal.", "enum.", "fractions.", "pathlib.", "typing.", "uuid.", "zoneinfo."),
    *("torch.amp.", "torch.ao.", "torch.cuda.amp.", "torch.nn.", "torch.optim.", "torch.storage."),
    "numpy.random.",
)


def _is_harmless(name: str) -> bool:
    """Whether checkpoints may name this: classes of data, of torch's networks and optimisers, and other people's."""
    top, _, rest = name.partition(".")
    if top not in sys.stdlib_module_names and top not in ("torch", "numpy"):
        return True
    if name in _NAMES or name.startswith(_FREE):
        return True
    if top == "numpy":
        return rest.rstrip("_0123456789") in ("bool", "bytes", "complex", "datetime", "float", "int", "str", "uint")
    is_dtype = isinstance(vars(torch).get(rest), (torch.dtype, torch.layout, torch.memory_format, torch.qscheme))
    return top == "torch" and (is_dtype or (rest.endswith("Storage") and rest.removeprefix("cuda.").isalnum()))


class _Machine:
    """Carries out one pickle after another, by the opcodes of protocols 2 to 5."""

    def __init__(self, data: bytearray, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop
        self.limit = start + MOST_PICKLED
        self.steps, self.odd_keys = 0, 0
        self.storages: dict[str, _Storage] = {}
        self.names: dict[str, Name] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """The object that the pickle at `at` makes; `at` is behind it afterwards."""
        self.stack, self.marks, self.memo = [], [], []
        actions, data = _ACTIONS, self.data
        while True:
            if self.at >= self.stop:
                raise ValueError("its pickle is cut off")
            if self.steps >= MOST_STEPS or self.at > self.limit:
                raise RefusedError(
                    f"its pickle has over {MOST_STEPS} steps or {MOST_PICKLED} bytes, besides the tensors; "
                    "save the state_dict alone"
                )
            self.steps += 1
            code = data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.pop()
            action = actions.get(code)
            if action is None:
                raise ValueError(f"the opcode {bytes([code])!r}, which torch.save does not write")
            action(self)

    def take(self, count: int) -> bytearray:
        if count > self.stop - self.at:
            raise ValueError("its pickle is cut off")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str, size: int) -> Any:
        if size > self.stop - self.at:
            raise ValueError("its pickle is cut off")
        (value,) = unpack_from(kind, self.data, self.at)
        self.at += size
        return value

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, min(self.at + 1000, self.stop))
        if end < 0:
            raise ValueError("a name without end")
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def text(self, count: int) -> None:
        self.stack.append(self.take(count).decode("utf-8", "surrogatepass"))

    def pop(self) -> Any:
        """The top of the stack; nothing that lies below the last mark."""
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError("no mark")
        at = self.marks.pop()
        items = self.stack[at:]
        del self.stack[at:]
        return items

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def remember(self, index: int) -> None:
        """Picklers number what they keep from 0, and Python 2's from 1."""
        value = self.top()
        if index < len(self.memo):
            self.memo[index] = value
        elif index <= len(self.memo) + 1:
            self.memo += [None] * (index - len(self.memo)) + [value]
        else:
            raise ValueError("kept objects are not numbered in order")

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def integer(self, count: int) -> None:
        if count > 1000:
            raise RefusedError(f"it holds an integer of {count} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def name(self, module: str, name: str) -> None:
        # Protocol 2 is written with the names of Python 2.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        text = f"{module}.{name}"
        if text not in self.names:
            if not _is_harmless(text):
                raise RefusedError(f"it names {quoted(text)}, which no checkpoint needs; nothing of it was run")
            self.names[text] = Name(text)
        self.stack.append(self.names[text])

    def name_of_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > 1000:
            raise ValueError("a name that is no text")
        self.name(module, name)

    def put(self, container: Any, key: Any, value: Any) -> None:
        """Keys hash in constant time, and only so many of them in a way that the file could choose to collide."""
        if isinstance(container, Inert):
            return
        if not isinstance(container, dict):
            raise ValueError(f"an entry is put into {kind(container)}")
        if type(key) in (tuple, float) or (type(key) is int and not 0 <= key < 1 << 20):
            self.odd_keys += 1
            if self.odd_keys > MOST_ODD_KEYS:
                raise RefusedError(f"it has over {MOST_ODD_KEYS} keys that are large numbers or tuples")
            inner = key if type(key) is tuple else ()
            if len(inner) > 8 or any(type(v) not in (str, int, bool, float, type(None)) for v in inner):
                raise RefusedError("a key of one of its dicts is a tuple of more than a few numbers and texts")
        elif isinstance(key, (list, dict)):
            raise ValueError(f"a key is {kind(key)}")
        container[key] = value

    def set_items(self) -> None:
        items = self.pop_mark()
        container = self.top()
        if len(items) % 2:
            raise ValueError("a key without value")
        for i in range(0, len(items), 2):
            self.put(container, items[i], items[i + 1])

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.put(self.top(), key, value)

    def extend(self, items: list[Any]) -> None:
        container = self.top()
        if isinstance(container, list):
            container += items
        elif not isinstance(container, Inert):
            raise ValueError(f"items are put into {kind(container)}")

    def build(self) -> None:
        state, thing = self.pop(), self.top()
        if isinstance(thing, Inert):
            thing.state = state
        elif not isinstance(thing, (dict, Stored)):  # their attributes, such as _metadata, are left out
            raise ValueError(f"{kind(thing)} gets attributes")

    def make(self, keywords: bool = False) -> None:
        if keywords:
            self.pop()
        args, cls = self.pop(), self.pop()
        self.stack.append(Inert(cls.text if isinstance(cls, Name) else kind(cls), args))

    def call(self) -> None:
        args, function = self.pop(), self.pop()
        if not isinstance(args, tuple):
            raise ValueError("a call without arguments")
        self.stack.append(self.answer(function, args))

    def answer(self, function: Any, args: tuple[Any, ...]) -> Any:
        """What the few functions that matter return; an `Inert` for all others."""
        if not isinstance(function, Name):
            raise ValueError(f"{kind(function)} is called")
        known = _FUNCTIONS.get(function.text)
        return Inert(function.text, args) if known is None else known(self, *args[:8])

    def persistent(self) -> None:
        """("storage", type, key, device, count[, view]), or ("module", class, file, source) up to torch 1.5."""
        record = self.pop()
        if not isinstance(record, tuple) or len(record) < 4 or record[0] not in ("storage", "module"):
            raise ValueError("a record that is no storage")
        if record[0] == "module":
            self.stack.append(record[1])
            return
        _, cls, key, _, count = record[:5] if len(record) > 4 else (*record, None)
        dtype = _STORAGES.get(cls.text.rpartition(".")[2]) if isinstance(cls, Name) else None
        if dtype is None or type(key) is not str or not _are_sizes((count,)) or record[5:] not in ((), (None,)):
            raise ValueError("a storage of unknown type or size")
        storage = self.storages.setdefault(key, _Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"the storage {quoted(key)} has two types or sizes")
        self.stack.append(storage)


def _pairs(machine: _Machine, pairs: Any = (), *_: Any) -> Any:
    found: OrderedDict[Any, Any] = OrderedDict()
    if isinstance(pairs, Name):  # the factory of a defaultdict
        return found
    machine.steps += len(pairs)
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError("an OrderedDict of no pairs")
        machine.put(found, *pair)
    return found


def attributes(thing: Inert) -> dict[str, Any]:
    """The attributes that `thing` was pickled with."""
    return thing.state if isinstance(thing.state, dict) else {}


def _size(machine: _Machine, size: Any = (), *_: Any) -> Any:
    if not isinstance(size, (tuple, list)) or len(size) > 64:
        raise ValueError("a size of too many dimensions")
    return tuple(size)


def _tensor(machine: _Machine, storage: Any = None, offset: Any = None, size: Any = None, *more: Any) -> Any:
    return Stored(storage, offset, size, more[0] if more else None)


def _tensor_v3(machine: _Machine, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
    name = more[2].text if len(more) > 2 and isinstance(more[2], Name) else ""
    dtype = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of no type")
    return Stored(storage, offset, size, stride, dtype)


def _parameter(machine: _Machine, data: Any = None, *_: Any) -> Any:
    return data


def _with_attributes(machine: _Machine, function: Any, cls: Any, args: Any, *_: Any) -> Any:
    if not isinstance(args, tuple) or (isinstance(function, Name) and function.text.endswith("from_type_v2")):
        raise ValueError("a tensor of a tensor")
    return machine.answer(function, args)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs,
    "collections.defaultdict": _pairs,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
}

_ACTIONS: dict[int, Callable[[_Machine], Any]] = {
    ord(code): action
    for code, action in {
        "\x80": lambda m: m.number("<B", 1),  # PROTO
        "\x95": lambda m: m.number("<Q", 8),  # FRAME, whose length says nothing that is needed
        "(": lambda m: m.marks.append(len(m.stack)),
        "0": lambda m: m.pop(),
        "1": lambda m: m.pop_mark(),
        "2": lambda m: m.stack.append(m.top()),
        "N": lambda m: m.stack.append(None),
        "\x88": lambda m: m.stack.append(True),
        "\x89": lambda m: m.stack.append(False),
        "J": lambda m: m.stack.append(m.number("<i", 4)),
        "K": lambda m: m.stack.append(m.number("<B", 1)),
        "M": lambda m: m.stack.append(m.number("<H", 2)),
        "G": lambda m: m.stack.append(m.number(">d", 8)),
        "\x8a": lambda m: m.integer(m.number("<B", 1)),
        "\x8b": lambda m: m.integer(m.number("<I", 4)),
        "\x8c": lambda m: m.text(m.number("<B", 1)),
        "X": lambda m: m.text(m.number("<I", 4)),
        "\x8d": lambda m: m.text(m.number("<Q", 8)),
        "U": lambda m: m.stack.append(bytes(m.take(m.number("<B", 1)))),
        "T": lambda m: m.stack.append(bytes(m.take(m.number("<I", 4)))),
        "C": lambda m: m.stack.append(bytes(m.take(m.number("<B", 1)))),
        "B": lambda m: m.stack.append(bytes(m.take(m.number("<I", 4)))),
        "\x8e": lambda m: m.stack.append(bytes(m.take(m.number("<Q", 8)))),
        "\x96": lambda m: m.stack.append(Inert("builtins.bytearray", m.take(m.number("<Q", 8)))),
        ")": lambda m: m.stack.append(()),
        "]": lambda m: m.stack.append([]),
        "}": lambda m: m.stack.append({}),
        "\x8f": lambda m: m.stack.append(Inert("builtins.set")),
        "t": lambda m: m.stack.append(tuple(m.pop_mark())),
        "\x85": lambda m: m.push_tuple(1),
        "\x86": lambda m: m.push_tuple(2),
        "\x87": lambda m: m.push_tuple(3),
        "a": lambda m: m.extend([m.pop()]),
        "e": lambda m: m.extend(m.pop_mark()),
        "\x90": lambda m: m.extend(m.pop_mark()),  # ADDITEMS
        "\x91": lambda m: m.stack.append(Inert("builtins.frozenset", m.pop_mark())),
        "s": lambda m: m.set_item(),
        "u": lambda m: m.set_items(),
        "q": lambda m: m.remember(m.number("<B", 1)),
        "r": lambda m: m.remember(m.number("<I", 4)),
        "\x94": lambda m: m.remember(len(m.memo)),
        "h": lambda m: m.recall(m.number("<B", 1)),
        "j": lambda m: m.recall(m.number("<I", 4)),
        "c": lambda m: m.name(m.line(), m.line()),
        "\x93": lambda m: m.name_of_stack(),
        "R": lambda m: m.call(),
        "\x81": lambda m: m.make(),
        "\x92": lambda m: m.make(keywords=True),
        "b": lambda m: m.build(),
        "Q": lambda m: m.persistent(),
    }.items()
}


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
