"""An untrusted PyTorch pickle → tensors and attributes, without running anything of it; `checkpoint` builds on them.

Reading goes through `torch.load(weights_only=True)`, whose allowlist is extended by the names that a checkpoint of the
reference repository (eksuas/eenets.pytorch) contains. Each of them stands for `Inert` here, never for the real thing.
"""

from __future__ import annotations

import io
import pickletools
import re
import threading
import zipfile
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

MOST_ENTRIES = 100_000


class Inert:
    """Stand-in for any class or function that a checkpoint names: it keeps attributes and does nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def _class_of(kind: str, container: Any, source_file: Any, source: Any) -> Any:
    return container


_CLASS_OF = "eefast.container"
_NAMES = (
    *(
        f"{module}.{name}"
        for module in ("eenet", "custom_eenet", "EENets", "__main__")
        for name in ("EENet", "CustomEENet", "ExitBlock", "BasicBlock", "Bottleneck")
    ),
    *(
        f"torch.nn.modules.{name}"
        for name in (
            "activation.ReLU",
            "activation.Sigmoid",
            "activation.Softmax",
            "batchnorm.BatchNorm2d",
            "container.ModuleList",
            "container.Sequential",
            "conv.Conv2d",
            "linear.Linear",
            "pooling.AdaptiveAvgPool2d",
            "pooling.AvgPool2d",
            "pooling.MaxPool2d",
        )
    ),
    "torch.nn.parallel.data_parallel.DataParallel",
    # torch up to 1.2 pickled the backend of every module.
    "torch.nn.backends.thnn._get_thnn_function_backend",
    # The reference's FLOP counter leaves numpy scalars in every BatchNorm and pooling, and in the costs.
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
_ALLOWED: list[Any] = [(_class_of, _CLASS_OF), *((Inert, name) for name in _NAMES)]

# torch keeps its allowlist in one global set, so two readers at a time would take each other's names away.
_lock = threading.Lock()


def read(data: bytes) -> Any:
    """What a file written by `torch.save` holds, on the CPU: tensors, containers, and `Inert` for every module.

    data: the file, in the zip format or in the one before torch 1.6.
    Raises `ValueError` for everything else: other formats, damaged files, names of code that no network needs.
    """
    try:
        if data.startswith(b"PK"):
            _check_archive(data)
        else:
            data = _without_sources(data)
        with _lock, safe_globals(_ALLOWED):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True, mmap=False)
    # A damaged or hostile file may raise anything, and torch's own message recommends to run it after all.
    except Exception as error:
        text = str(error).rsplit("WeightsUnpickler error:", maxsplit=1)[-1].strip()
        if found := re.search(r"GLOBAL (\S{1,99})", text):
            reason = f"it names {found[1]!r}, which no network of eksuas/eenets.pytorch needs; nothing of it was run"
        else:
            text = f"{type(error).__name__}: {text.partition(chr(10))[0][:200]}"
            reason = f"it is no intact file of torch.save ({text}); copy or download it again"
        raise ValueError(reason) from None


def tensors(module: Inert) -> dict[str, Any]:
    """Parameters and buffers of a pickled module by name, as its `state_dict` had them.

    Plain lists called `layers` count as well: the reference keeps the BatchNorms of its `bnpool` exits in one.
    Raises `ValueError` where modules contain themselves or are nested beyond reason.
    """
    found: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", module)]
    left = MOST_ENTRIES
    while todo:
        prefix, owner = todo.pop()
        inside = vars(owner)
        values = [*_table(inside, "_parameters"), *_table(inside, "_buffers")]
        children = _table(inside, "_modules")
        if isinstance(layers := inside.get("layers"), list):
            children += [(f"layers.{i}", child) for i, child in enumerate(layers)]
        left -= 1 + len(values) + len(children)
        if left < 0:
            raise ValueError(f"its modules hold over {MOST_ENTRIES} things; no network of eksuas/eenets.pytorch does")
        found |= {prefix + name: value for name, value in values if value is not None}
        todo += [(f"{prefix}{name}.", child) for name, child in children if isinstance(child, Inert)]
    return found


def _table(inside: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    entries = inside.get(kind, {})
    if not isinstance(entries, dict) or not all(isinstance(name, str) and len(name) < 100 for name in entries):
        raise ValueError(f"{kind} of one of its modules is no table by name")
    return list(entries.items())


def _check_archive(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    # torch.save never compresses, so what unpacks to more than the file was made to fill memory.
    if unpacked > len(data):
        raise ValueError(f"{unpacked} bytes packed into {len(data)}")


def _without_sources(data: bytes) -> bytes:
    """The old format with every `("module", class, file, source)` record turned into a plain mention of the class.

    torch's restricted reader takes no persistent ids but storages, and whole modules saved before torch 1.6 have these
    as well. The record's tuple is handed to `_class_of` instead: the opcode of the persistent id becomes a call, and
    the function goes in front of the tuple. No byte in between changes, and that reader still judges every one.
    """
    stream = io.BytesIO(data)
    for _header in ("magic number", "protocol version", "machine"):
        for _ in pickletools.genops(stream):
            pass
    parts: list[bytes] = []
    edits: list[tuple[int, int, bytes]] = []
    marks: list[tuple[int, list[Any]]] = []
    memo: dict[Any, Any] = {}
    text: Any = None
    record: tuple[int, list[Any]] | None = None
    for opcode, arg, position in pickletools.genops(stream):
        at = position or 0
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[arg] = text
            continue
        if opcode.name == "BINPERSID" and record and record[1][:1] == ["module"]:
            edits += [(record[0], record[0], "c{}\n{}\n".format(*_CLASS_OF.split(".")).encode()), (at, at + 1, b"R")]
        text = arg if opcode.name == "BINUNICODE" else memo.get(arg) if "BINGET" in opcode.name else None
        closed = marks.pop() if pickletools.markobject in opcode.stack_before else None
        record = closed if opcode.name == "TUPLE" else None
        if opcode.name == "MARK":
            marks.append((at, []))
        elif marks:
            marks[-1][1].append(text)
    done = 0
    for start, stop, replacement in sorted(edits):
        parts += [data[done:start], replacement]
        done = stop
    return b"".join([*parts, data[done:]])


def is_plain(value: Any) -> bool:
    """Whether `value` is a dense tensor in memory, nothing sparse, lazy or derived."""
    dense = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
    return dense and value.device.type == "cpu"
