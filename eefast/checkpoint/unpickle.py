"""The bytes of a `torch.save` file → tensors and containers, without running anything of it; `state_dict` takes them.

The pickle is read by `pickle_machine`, which knows containers, numbers, texts and tensors. Every other class or
function that a file names becomes an `Inert`, so that there is nothing that could run. Work and memory are limited: the
machine takes a limited number of steps, each of constant time, and a tensor is a view of the file's bytes.
"""

from __future__ import annotations

from struct import unpack_from
from typing import Any

from . import archive
from .pickle_machine import Machine
from .pickled import RefusedError, Storage
from .stored import quoted

_ZIP, _PICKLE = b"PK\3\4", b"\x80"
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


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

    def find(storage: Storage) -> None:
        place = places.get(f"{root}data/{storage.key}")
        if place is None or storage.count * storage.dtype.itemsize > place[1]:
            raise ValueError(f"the storage {quoted(storage.key)} is missing or shorter than it claims")
        storage.place = place

    start, size = places[f"{root}data.pkl"]
    machine = Machine(data, start, start + size)
    content = machine.run()
    for storage in machine.storages.values():
        find(storage)
    return content


def _read_legacy(data: bytearray) -> Any:
    """Three pickled headers, the pickled object, the pickled list of its storages, and these."""
    machine = Machine(data, 0, len(data))
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
