"""A path of unknown origin → the bytes, JSON or tensors in the file, read within limits.

Every function raises `ValueError`, which says what is wrong, or `OSError`.
"""

from __future__ import annotations

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import inf, isnan, prod
from pathlib import Path
from struct import unpack_from
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MOST_JSON = 1 << 20
MOST_HEADER = 2 << 20
"""Bytes of a JSON file, and of the header of a .safetensors file: room for 15,000 tensors."""

_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "C64": "complex64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}


def read(path: Path, most: int | None = None, check: Callable[[bytes], None] | None = None) -> bytearray:
    """The bytes of a regular file; devices, pipes, sockets, folders and sparse files are refused unread.

    most: bytes that it may have. check: gets its first 16 bytes, and raises for a file that is not worth reading.
    """
    _check_regular(path, path.stat())  # opening a device may have effects
    # Without waiting, in case a pipe has replaced it since.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:  # noqa: PTH123 (of a descriptor)
        status = os.fstat(file.fileno())
        _check_regular(path, status)
        size = status.st_size
        if most is not None and size > most:
            raise ValueError(f"{path.name} has {size} bytes; at most {most} are read")
        if check is not None:
            check(file.read(16))
        _check_filled(path, file.fileno(), status)
        file.seek(0)
        data = bytearray(size)
        rest = memoryview(data)
        while rest:
            if not (count := file.readinto(rest)):
                raise ValueError(f"{path.name} has become shorter while it was read; try again")
            rest = rest[count:]
    return data


def _check_regular(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "device")
        raise ValueError(f"{path.name} is a {kind}; only a regular file is read")


def _check_filled(path: Path, descriptor: int, status: os.stat_result) -> None:
    """Holes cost no disk, but memory when read. Some file systems count no blocks, so holes are asked for."""
    stored = getattr(status, "st_blocks", status.st_size) * 512
    if status.st_size <= 4 * stored + (16 << 20) or not hasattr(os, "SEEK_HOLE"):
        return
    if os.lseek(descriptor, 0, os.SEEK_HOLE) < status.st_size:
        raise ValueError(f"{path.name} is a sparse file: {status.st_size} bytes, of which {stored} are stored")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, without NaN, infinities and doubled keys."""
    return parse_json(read(path, MOST_JSON), path.name)


def parse_json(text: bytes | bytearray, name: str) -> dict[str, Any]:
    """The JSON object in `text`; name: of the file, for errors."""
    try:
        found = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        doubled, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {quoted(doubled)} occurs twice")
    return found


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], int]:
    """Tensors by name, all of them views of one buffer, and the bytes of the file."""
    data = read(path)
    try:
        return parse_safetensors(data), len(data)
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); save the network again") from error


def parse_safetensors(data: bytearray) -> dict[str, Tensor]:
    """Tensors by name, views of `data`, the content of a safetensors file."""
    if len(data) < 8 or (length := unpack_from("<Q", data)[0]) > len(data) - 8:
        raise ValueError("it is shorter than its header")
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length} bytes; at most {MOST_HEADER} are read")
    header = parse_json(data[8 : 8 + length], "its header")
    header.pop("__metadata__", None)
    places: list[tuple[int, int, str, torch.dtype, list[int]]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{quoted(name)} must have exactly dtype, shape and data_offsets")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = getattr(torch, _DTYPES.get(kind, "") if isinstance(kind, str) else "", None)
        if dtype is None:
            raise ValueError(f"{quoted(name)} has the dtype {quoted(str(kind))}, which is not supported")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{quoted(name)} has no shape or no data_offsets")
        if offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
            raise ValueError(f"{quoted(name)} has another number of bytes than its shape")
        places.append((*offsets, name, dtype, shape))
    end = 0
    for start, stop, name, _, _ in sorted(places, key=lambda place: place[:2]):
        if start != end:
            raise ValueError(f"{quoted(name)} does not begin where the tensor before it ends")
        end = stop
    if end != len(data) - 8 - length:
        raise ValueError("its tensors do not fill it")
    return {name: view(data, dtype, 8 + length + start, shape) for start, _, name, dtype, shape in places}


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(type(v) is int and 0 <= v < 2**47 for v in value)


def view(
    data: bytearray, dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int] | None = None
) -> Tensor:
    """The tensor at byte `offset` of `data`, sharing its memory where the processor can read it there.

    shape, stride: in elements, non-negative, checked by the caller to stay inside of `data`.
    """
    if 0 in shape:
        return torch.empty(tuple(shape), dtype=dtype)
    reach = prod(shape) if stride is None else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    found = torch.frombuffer(data, dtype=torch.uint8, count=reach * dtype.itemsize, offset=offset)
    if found.data_ptr() % dtype.itemsize:
        found = found.clone()
    flat = found.view(dtype)
    return flat.view(tuple(shape)) if stride is None else flat.as_strided(tuple(shape), tuple(stride))


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """`ValueError` that names the first weight with a NaN or an infinity, or the first negative variance.

    An infinite threshold, or bias of a confidence row, is valid: no sample exits there, or all do. The network checks
    its thresholds.
    """
    for name, value in weights.items():
        if name == "thresholds" or value.dtype not in FLOATS or not value.numel():
            continue
        least, most = (float(v) for v in value.detach().aminmax())
        if isnan(least) or (not name.endswith("confidence.bias") and max(-least, most) == inf):
            raise ValueError(f"the weight {name} holds NaN or infinite numbers; train again from an earlier state")
        if name.endswith("running_var") and least < 0:
            raise ValueError(f"{name} holds the negative variance {least:.4g}; train again from an earlier state")


def quoted(text: str) -> str:
    """A name from a file, for messages: short, and every character printable."""
    return repr(text if len(text) <= 80 else text[:79] + "…")
