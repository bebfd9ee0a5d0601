"""The opcodes of a pickle → the object that they make, without running anything that they name."""

from __future__ import annotations

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from struct import unpack_from
from typing import Any

import torch

from .pickled import Inert, Name, RefusedError, Storage, Stored, are_sizes, kind
from .pickled_names import is_harmless
from .stored import quoted

MOST_PICKLED = 8 << 20
MOST_STEPS = 500_000
"""Bytes and steps of a pickle, without the tensors' contents: each tensor takes 30 steps, whole modules more."""
MOST_ODD_KEYS = 5_000

_STORAGES = {
    **{"DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16},
    **{"BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32},
    **{"ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8},
    **{"BoolStorage": torch.bool, "UntypedStorage": torch.uint8},
    **{"ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128},
}


class Machine:
    """Carries out one pickle after another, by the opcodes of protocols 2 to 5."""

    def __init__(self, data: bytearray, start: int, stop: int) -> None:
        self.data, self.at, self.stop = data, start, stop
        self.limit = start + MOST_PICKLED
        self.steps, self.odd_keys = 0, 0
        self.storages: dict[str, Storage] = {}
        self.names: dict[str, Name] = {}
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        """The object that the pickle at `at` makes; `at` is the byte after it afterwards."""
        self.stack, self.marks, self.memo = [], [], []
        actions, data = _ACTIONS, self.data
        while True:
            if self.at >= self.stop:
                raise ValueError("its pickle is cut off")
            if self.steps >= MOST_STEPS or self.at > self.limit:
                raise RefusedError(
                    f"its pickle has over {MOST_STEPS} steps or {MOST_PICKLED} bytes without the tensors; "
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
        """The top of the stack; nothing below the last mark."""
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
            if not is_harmless(text):
                raise RefusedError(f"it names {quoted(text)}, which no checkpoint needs; nothing of it was run")
            self.names[text] = Name(text)
        self.stack.append(self.names[text])

    def name_of_stack(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str) or len(name) + len(module) > 1000:
            raise ValueError("a name that is no text")
        self.name(module, name)

    def put(self, container: Any, key: Any, value: Any) -> None:
        """Keys hash in constant time, and at most MOST_ODD_KEYS are of kinds whose hashes a file could make collide."""
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
        elif not isinstance(thing, (dict, Stored)):  # their attributes, such as _metadata, are ignored
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
        if dtype is None or type(key) is not str or not are_sizes((count,)) or record[5:] not in ((), (None,)):
            raise ValueError("a storage of unknown type or size")
        storage = self.storages.setdefault(key, Storage(key, dtype, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"the storage {quoted(key)} has two types or sizes")
        self.stack.append(storage)


def _pairs(machine: Machine, pairs: Any = (), *_: Any) -> Any:
    found: OrderedDict[Any, Any] = OrderedDict()
    if isinstance(pairs, Name):  # the factory of a defaultdict
        return found
    machine.steps += len(pairs)
    for pair in pairs.items() if isinstance(pairs, dict) else pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError("an OrderedDict of no pairs")
        machine.put(found, *pair)
    return found


def _size(machine: Machine, size: Any = (), *_: Any) -> Any:
    if not isinstance(size, (tuple, list)) or len(size) > 64:
        raise ValueError("a size of too many dimensions")
    return tuple(size)


def _tensor(machine: Machine, storage: Any = None, offset: Any = None, size: Any = None, *more: Any) -> Any:
    return Stored(storage, offset, size, more[0] if more else None)


def _tensor_v3(machine: Machine, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Any:
    name = more[2].text if len(more) > 2 and isinstance(more[2], Name) else ""
    dtype = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of no type")
    return Stored(storage, offset, size, stride, dtype)


def _parameter(machine: Machine, data: Any = None, *_: Any) -> Any:
    return data


def _with_attributes(machine: Machine, function: Any, cls: Any, args: Any, *_: Any) -> Any:
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

_ACTIONS: dict[int, Callable[[Machine], Any]] = {
    ord(code): action
    for code, action in {
        "\x80": lambda m: m.number("<B", 1),  # PROTO
        "\x95": lambda m: m.number("<Q", 8),  # FRAME, whose length is not needed
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
