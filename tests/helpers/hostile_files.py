"""Files made to harm the process that loads them, by kind and seed, and the process in which `eefast.load` meets them.

`python tests/helpers/hostile_files.py` loads all and prints the worst of each kind;
`tests/checkpoint/test_hostile_files.py` loads a part.
"""

import argparse
import collections
import io
import json
import os
import pickle
import random
import resource
import selectors
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reference_nets import CustomEENet, EENet, importable
from safetensors.torch import save as safetensors
from torch import nn

from eefast import zoo

Content = bytes | dict[str, bytes] | Callable[[Path], object]


@dataclass(frozen=True)
class File:
    """kind, label: what it is. content: of a file, of files in a folder, or what makes it at a path. loads: it must."""

    kind: str
    label: str
    content: Content
    loads: bool = False

    def write(self, folder: Path) -> Path:
        path = folder / "model.pt"
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        elif isinstance(self.content, dict):
            path.mkdir()
            for name, content in self.content.items():
                (path / name).write_bytes(content)
        else:
            self.content(path)
        return path


KINDS: dict[str, Callable[[random.Random, Path], Iterator[tuple[str, Content]]]] = {}


def kind(make):
    KINDS[make.__name__] = make
    return make


def files(kind: str, seed: int, canary: Path) -> Iterator[File]:
    """The controls, or all hostile files of a kind; code in them would create `canary`."""
    made = controls() if kind == "control" else KINDS[kind](random.Random(seed), canary)
    for label, content in made:
        yield File(kind, label, content, loads=kind == "control")


# Pickles, by hand: what no pickler writes.


def text(value: str) -> bytes:
    return (
        b"X" + struct.pack("<I", len(value.encode("utf-8", "surrogatepass"))) + value.encode("utf-8", "surrogatepass")
    )


def integer(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(content) < 256:
        return b"\x8a" + bytes([len(content)]) + content
    return b"\x8b" + struct.pack("<I", len(content)) + content


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def call(module: str, attribute: str, *args: bytes) -> bytes:
    return name(module, attribute) + b"(" + b"".join(args) + b"tR"


def many(values: list[int]) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def stored(
    claim: int, shape: list[int], stride: list[int], offset: int = 0, key: str = "0", dtype: str = "Float"
) -> bytes:
    storage = (
        b"(" + text("storage") + name("torch", f"{dtype}Storage") + text(key) + text("cpu") + integer(claim) + b"tQ"
    )
    return call(
        "torch._utils", "_rebuild_tensor_v2", storage, integer(offset), many(shape), many(stride), b"\x89", b"N"
    )


def table(entries: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def zipped(body: bytes, storages: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled(body))
        file.writestr("archive/version", "3\n")
        for key, content in (storages or {}).items():
            file.writestr(f"archive/data/{key}", content)
    return stream.getvalue()


def legacy(body: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    header = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    start = b"".join(pickle.dumps(part, protocol=2) for part in header) + pickled(body)
    keys = pickle.dumps(list(storages or {}), protocol=2)
    return start + keys + b"".join(struct.pack("<q", len(v) // 4) + v for v in (storages or {}).values())


def both(label: str, body: bytes, storages: dict[str, bytes] | None = None) -> Iterator[tuple[str, bytes]]:
    yield f"{label}, zip", zipped(body, storages)
    yield f"{label}, legacy", legacy(body, storages)


def saved(thing: object, old: bool = False, protocol: int = 2) -> bytes:
    stream = io.BytesIO()
    with importable():
        torch.save(thing, stream, pickle_protocol=protocol, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def small() -> nn.Module:
    return CustomEENet((1, 8, 8), 3, 2)


def folder(net=None, **changes) -> dict[str, bytes]:
    """Of a small EENet-8, or of `net`, with other entries in its config.json."""
    content = FOLDER if net is None else {}
    if not content:
        net = net or zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8), normalization=((0.5,), (2.0,)))
        with tempfile.TemporaryDirectory() as place:
            net.save(place)
            content.update({path.name: path.read_bytes() for path in Path(place).iterdir()})
    config = json.loads(content["config.json"]) | changes
    return content | {"config.json": json.dumps(config).encode()}


FOLDER: dict[str, bytes] = {}
ATTACHED: dict[str, bytes] = {}


def attached(**changes) -> dict[str, bytes]:
    """Of torchvision's squeezed MobileNet with two exits."""
    from eefast.surgery import attach, backbone

    if not ATTACHED:
        body = backbone("torchvision:mobilenet_v3_small", 5).eval()
        ATTACHED.update(folder(attach(body, ["features.1", "features.4"], input_shape=(3, 32, 32))))
    config = json.loads(ATTACHED["config.json"]) | changes
    return ATTACHED | {"config.json": json.dumps(config).encode()}


def attached_in_the_old_format() -> dict[str, bytes]:
    """As `eefast train --backbone` wrote it first."""
    files = attached()
    config = json.loads(files.pop("config.json"))
    del config["kind"]
    return files | {"attached.json": json.dumps(config).encode()}


def controls() -> Iterator[tuple[str, Content]]:
    """What must load."""
    state = small().state_dict()
    for old in (False, True):
        yield f"state_dict, old={old}", saved(state, old)
        yield f"module, old={old}", saved(EENet(20, (2, 4), "pool", 3, (1, 8, 8)), old)
    yield "protocol 4", saved(state, protocol=4)
    yield "checkpoint", saved({"state_dict": state, "epoch": np.int64(3), "optimizer": {"state": {0: {"step": 1}}}})
    yield "compiled", saved({"model": {f"module._orig_mod.{key}": value for key, value in state.items()}})
    yield "folder", folder()
    yield "attached", attached()
    yield "attached, old format", attached_in_the_old_format()


# Kinds.


@kind
def code(rng, canary):
    """Pickles that call something when they are loaded as pickles."""
    touch = text(f"open({str(canary)!r}, 'w').close()")
    shell = text(f"touch '{canary}'")
    payloads = {
        "os.system": call("os", "system", shell),
        "posix.system": call("posix", "system", shell),
        "eval": call("builtins", "eval", touch),
        "exec": call("builtins", "exec", touch),
        "exec of Python 2": call("__builtin__", "exec", touch),
        "open": call("builtins", "open", text(str(canary)), text("w")),
        "popen": call("subprocess", "Popen", text("touch"), text(str(canary))),
        "commands": call("commands", "getoutput", shell),
        "runstring": call("numpy.testing._private.utils", "runstring", touch, b"}"),
        "timeit": call("timeit", "timeit", touch, b"K\x01"),
        "import": call("builtins", "__import__", text("antigravity")),
        "getattr": call("builtins", "getattr", name("os", "system"), text("__call__")),
        "partial": call("functools", "partial", name("os", "system"), shell),
        "torch.load": call("torch.serialization", "load", text("/dev/zero")),
        "torch.hub": call("torch.hub", "load", text("somebody/something"), text("net")),
        "a rebuilt type": call(
            "torch._tensor", "_rebuild_from_type_v2", name("os", "system"), b"N", b"(" + shell + b"t"
        ),
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + shell + b"o",
        "stack global": text("os") + text("system") + b"\x93(" + shell + b"tR",
        "new object": name("subprocess", "Popen") + b"(" + text("touch") + b"t\x81",
        "state": name("collections", "OrderedDict") + b")R" + table({"__class__": name("os", "system")}) + b"b",
        "reconstructor": call("copy_reg", "_reconstructor", name("os", "system"), name("builtins", "object"), b"N"),
        "extension": b"\x82\x01",
        "persistent id": b"(" + text("module") + call("os", "system", shell) + text("f.py") + text("x") + b"tQ",
        "setstate of a class": name("somebody.net", "Net")
        + b")\x81"
        + table({"x": call("os", "system", shell)})
        + b"b",
    }
    for label, payload in payloads.items():
        yield from both(label, table({"a": payload}))
        yield f"{label}, bare", pickled(payload)
    state = small().state_dict()
    yield "beside weights", saved({"state_dict": state, "hook": Call(os.system, f"touch '{canary}'")})


class Call:
    def __init__(self, function, *args):
        self.answer = function, args

    def __reduce__(self):
        return self.answer


@kind
def nested_keys(rng, canary):
    """Keys whose hash takes 2^depth steps, since the parts are shared."""
    for depth in (12, 24, 40, 200):
        key = b"K\x01K\x02\x86q\x00" + b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(depth))
        yield from both(f"SETITEM, depth {depth}", b"}" + key + b"K\x05s")
        yield f"SETITEMS, depth {depth}", zipped(b"}(" + key + b"K\x05u")
        yield f"OrderedDict, depth {depth}", zipped(call("collections", "OrderedDict", b"](" + key + b"K\x05\x86e"))
        yield f"set, depth {depth}", zipped(b"\x8f(" + key + b"\x90")
        yield f"frozenset, depth {depth}", zipped(b"(" + key + b"\x91")
        yield f"set of the list, depth {depth}", zipped(call("builtins", "set", b"](" + key + b"e"))


@kind
def colliding_keys(rng, canary):
    """Numbers that all have the same hash, so that a dict compares each with all before it."""
    prime = 2**61 - 1
    for label, keys in (
        ("multiples", [i * prime for i in range(60_000)]),
        ("powers", [i << 40 for i in range(60_000)]),
        ("negative", [-i * prime for i in range(60_000)]),
    ):
        yield from both(label, b"}(" + b"".join(integer(key) + b"N" for key in keys) + b"u")
    pairs = b"".join(integer(i * prime) + integer(-i * prime) + b"\x86N" for i in range(40_000))
    yield "tuples", zipped(b"}(" + pairs + b"u")
    yield (
        "floats",
        zipped(b"}(" + b"".join(b"G" + struct.pack(">d", float(i << 40)) + b"N" for i in range(60_000)) + b"u"),
    )
    memo = b"".join(b"Nr" + struct.pack("<I", i << 12) + b"0" for i in range(60_000))
    yield "memo", zipped(b"}" + memo)


@kind
def allocations(rng, canary):
    """A few bytes that ask for gigabytes."""
    huge = integer(3 * 10**9)
    calls = {
        "bytearray": call("builtins", "bytearray", huge),
        "bytes": call("builtins", "bytes", huge),
        "list": call("builtins", "list", call("builtins", "range", integer(10**9))),
        "Tensor": call("torch", "Tensor", huge),
        "FloatStorage": call("torch", "FloatStorage", huge),
        "UntypedStorage": call("torch.storage", "UntypedStorage", huge),
        "zeros": call("torch", "zeros", huge),
        "parameter": call("torch.nn.parameter", "Parameter", call("torch", "Tensor", huge)),
        "new Tensor": name("torch", "Tensor") + b"(" + huge + b"t\x81",
        "ndarray": call(
            "numpy.core.multiarray", "_reconstruct", name("numpy", "ndarray"), b"(" + huge + b"t", text("b")
        ),
        "Size": call("torch", "Size", b"](" + b"K\x01" * 100_000 + b"e"),
        "str": call("builtins", "str", call("builtins", "bytes", huge)),
        "Counter": call("collections", "Counter", text("x" * 100_000)),
    }
    for label, body in calls.items():
        yield from both(label, table({"a": body}))
    for label, opcode in (("BINBYTES", b"B"), ("BINUNICODE", b"X"), ("LONG4", b"\x8b"), ("BINSTRING", b"T")):
        yield label, zipped(opcode + struct.pack("<I", 2**32 - 1) + b"x")
    for label, opcode in (
        ("BINBYTES8", b"\x8e"),
        ("BINUNICODE8", b"\x8d"),
        ("BYTEARRAY8", b"\x96"),
        ("FRAME", b"\x95"),
    ):
        yield label, zipped(opcode + struct.pack("<Q", 2**63 - 1) + b"x")


@kind
def claims(rng, canary):
    """Tensors that reach beyond their storage, or storages beyond the file."""
    data = bytes(64)
    for label, claim, shape, stride, offset in (
        ("storage of 2^40", 2**40, [4], [1], 0),
        ("storage of 2^62", 2**62, [4], [1], 0),
        ("storage of -1", -1, [4], [1], 0),
        ("17 of 16", 16, [17], [1], 0),
        ("offset", 16, [4], [1], 2**40),
        ("negative offset", 16, [4], [1], -4),
        ("stride", 16, [4], [2**40], 0),
        ("negative stride", 16, [4], [-1], 8),
        ("negative size", 16, [-4], [1], 0),
        ("expanded", 16, [10**9, 10**9], [0, 0], 0),
        ("expanded to 2^64", 16, [2**32, 2**32], [0, 0], 0),
        ("nothing of 2^62", 16, [0, 2**62, 2**62], [1, 1, 1], 0),
        ("nothing", 16, [0, 2**40], [1, 1], 2**46),
        ("64 dimensions", 16, [1] * 64, [1] * 64, 0),
        ("1000 dimensions", 16, [1] * 1000, [1] * 1000, 0),
        ("fewer strides", 16, [2, 2], [1], 0),
        ("size of 2^2000", 16, [2**2000], [1], 0),
    ):
        yield from both(label, table({"stages.0.0.0.weight": stored(claim, shape, stride, offset)}), {"0": data})
    yield "no storage", zipped(table({"a": stored(4, [4], [1], key="9")}), {"0": data})
    yield "a storage by a path", zipped(table({"a": stored(4, [4], [1], key="../version")}), {"0": data})
    body = table({"a": stored(4, [4], [1]), "b": stored(4, [4], [1], dtype="Double")})
    yield "a storage of two types", zipped(body, {"0": data})


@kind
def shared(rng, canary):
    """One storage under many names, so that copies of all are much more than the file."""
    data = bytes(4 << 20)
    tensor = stored(1 << 20, [1 << 20], [1]) + b"q\x05"
    for count in (1_000, 20_000, 100_000):
        names = b"".join(text(f"w{i}") + (b"h\x05" if i else tensor) for i in range(count))
        yield f"{count} names", zipped(b"}(" + names + b"u", {"0": data})
    with torch.device("meta"):
        state = EENet(152, (3, 20), "pool", 2, (3, 16, 16)).state_dict()
    entries = {key: stored(1, [*value.shape], [0] * value.dim()) for key, value in state.items()}
    yield from both("EENet-152 of one number", table(entries), {"0": bytes(4)})
    state = {
        key: torch.zeros(1).expand(value.shape) if value.dim() else torch.tensor(0) for key, value in state.items()
    }
    yield "EENet-152 expanded", saved(state)


@kind
def runs(rng, canary):
    """Megabytes of one opcode."""
    for code in b"(}])N\x8f\x88":
        yield f"12 MB of {bytes([code])!r}", zipped(bytes([code]) * (12 << 20))
    for code in b"(}":
        yield f"20 MB of {bytes([code])!r}, legacy", legacy(bytes([code]) * (20 << 20))
    for label, start, unit in (
        ("tuples", b"N", b"\x85"),
        ("duplicates", b"N", b"2"),
        ("kept objects", b"N", b"\x94"),
        ("lists", b"", b"](" + b"N" * 9 + b"e"),
        ("appends", b"]", b"Na"),
        ("empty appends", b"]", b"(e"),
        ("doubled lists", b"]q\x00", b"h\x00a"),
        ("attributes", name("somebody.net", "Net") + b")\x81q\x00", b"}b"),
        ("names", b"", name("somebody.net", "Net")),
        ("objects", name("a", "b") + b"q\x00", b"h\x00)\x81"),
        ("OrderedDicts", name("collections", "OrderedDict") + b"q\x00", b"h\x00)R"),
        ("floats", b"](", b"G" + bytes(8)),
        ("texts", b"](", b"X\x01\x00\x00\x00a"),
    ):
        yield f"4 MB of {label}", zipped(start + unit * ((4 << 20) // len(unit)))


@kind
def quadratic(rng, canary):
    """The same long thing again and again."""
    pairs = b"](" + b"".join(text(str(i)) + b"N\x86" for i in range(30_000)) + b"eq\x00"
    again = b"h\x00\x85R0" + name("collections", "OrderedDict")
    yield "OrderedDicts of the same pairs", zipped(pairs + name("collections", "OrderedDict") + again * 30_000)
    items = b"}(" + b"".join(text(str(i)) + b"N" for i in range(30_000)) + b"uq\x00"
    yield "the same attributes", zipped(items + name("a", "B") + b")\x81" + b"h\x00b" * 60_000)
    yield (
        "the same tuple as Size",
        zipped(b"(" + b"K\x01" * 30_000 + b"tq\x00" + (name("torch", "Size") + b"h\x00\x85R0") * 20_000),
    )
    key = b"(" + b"K\x01" * 30_000 + b"tq\x00"
    yield "the same long key", zipped(key + b"}" + b"h\x00Ns" * 60_000)
    long = integer(1 << 7000) + b"q\x00"
    yield "the same large number as a key", zipped(long + b"}" + b"h\x00Ns" * 60_000)
    inner = b"}q\x00"
    for i in range(1, 200):
        inner += (
            b"}("
            + b"".join(text(key) + b"h" + bytes([i - 1]) for key in ("state_dict", "model", "net"))
            + b"uq"
            + bytes([i])
        )
    yield "checkpoints in checkpoints", zipped(inner)


@kind
def nesting(rng, canary):
    """Containers inside of containers, for a reader that recurses into them."""
    depth = 100_000
    yield from both("lists", b"]" * depth + b"a" * (depth - 1))
    yield from both("tuples", b")" + b"\x85" * depth)
    yield "dicts", zipped(b"}" + b"K\x00}" * depth + b"s" * depth)
    yield "state", zipped((name("a", "B") + b")\x81") * 40_000 + b"b" * 39_999)
    yield "modules", zipped(module_of(20_000))
    yield "state_dicts", zipped(b"}" + (text("state_dict") + b"}") * 50_000 + b"s" * 50_000)
    yield "objects as arguments", zipped(name("a", "B") + b"q\x000)" + (b"\x85q\x010h\x00h\x01R") * 60_000)
    yield "a list in itself", zipped(b"]q\x00h\x00a")
    yield "a state_dict in itself", zipped(b"}q\x00" + text("state_dict") + b"h\x00s")


def module_of(depth: int) -> bytes:
    start = (
        name("torch.nn.modules.container", "Sequential")
        + b")\x81}("
        + text("_parameters")
        + b"}"
        + text("_modules")
        + b"}"
        + text("0")
    )
    return start * depth + b"N" + b"sub" * depth


@kind
def modules(rng, canary):
    """Whole modules that are none."""
    loop, doubling = EENet(20, (2, 4), input_shape=(1, 8, 8)), nn.Identity()
    loop.exits[0]._modules["itself"] = loop
    for _ in range(64):
        doubling = nn.Sequential(doubling, doubling)
    yield "in itself", saved(loop)
    yield "doubled 64 times", saved(doubling)
    for attribute, value in (
        ("input_shape", (65535, 65535, 65535)),
        ("input_shape", (1, 65535, 32767)),
        ("input_shape", (1, 10**30, 8)),
        ("input_shape", "1x8x8"),
        ("input_shape", [1, [], 8]),
        ("exit_threshold", float("nan")),
        ("exit_threshold", 10**400),
        ("exit_threshold", {}),
        ("exit_type", ["pool"] * 10**5),
        ("exit_type", "x" * 10**6),
        ("_parameters", None),
        ("_parameters", {1: 2}),
        ("_modules", []),
        ("_buffers", {"a" * 10**6: None}),
        ("layers", [None] * 10**5),
    ):
        model = EENet(20, (2, 4), "pool", 3, (1, 8, 8))
        model.__dict__[attribute] = value
        yield f"{attribute} = {str(value)[:20]}", saved(model)


@kind
def numbers(rng, canary):
    """Numbers, texts and opcodes at their limits."""
    for label, body in (
        ("an integer of 2 MB", integer(1 << (8 * 2_000_000))),
        ("an integer of 4 kB as a size", table({"a": stored(16, [1 << 32_000], [1])})),
        ("an integer as text", b"L" + b"9" * 3_000_000 + b"L\n"),
        ("an integer without end", b"I" + b"1" * 3_000_000),
        ("a float as text", b"F" + b"1" * 3_000_000 + b"\n"),
        ("a quoted text", b"S'" + b"\\" * 3_000_001 + b"'\n"),
        ("memo 2^31", b"Nr" + struct.pack("<I", 2**31)),
        ("memo as text", b"Np99999999999999999999\n"),
        ("recalled 2^32-1", b"j" + struct.pack("<I", 2**32 - 1)),
        ("no mark", b"t"),
        ("an empty stack", b"\x87"),
        ("below the mark", b"N(0"),
        ("a name of 3 MB", name("a" * 3_000_000, "b")),
        ("a name in no encoding", b"c\xff\xfe\n\xff\n"),
        ("a text in no encoding", b"X\x02\x00\x00\x00\xff\xff"),
        ("protocol 255", b"\x80\xff}"),
        ("many protocols", b"\x80\x02" * 300_000 + b"}"),
        ("unknown opcodes", b"\xff\xfe\xfd"),
        ("buffers", b"\x97\x98"),
    ):
        yield from both(label, body)


def directory(data: bytes) -> int:
    return data.rindex(b"PK\5\6")


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@kind
def archives(rng, canary):
    """Zip files that say one thing to one reader and another to the next."""
    good, bomb = saved(small().state_dict()), zipped(b"}", {"0": bytes(30 << 20)}, zipfile.ZIP_DEFLATED)
    end, first = directory(good), good.index(b"PK\1\2")
    yield "compressed", bomb
    yield "bzip2", zipped(b"}", {"0": bytes(30 << 20)}, zipfile.ZIP_BZIP2)
    yield "lzma", zipped(b"}", {"0": bytes(3 << 20)}, zipfile.ZIP_LZMA)
    yield "two directories", bomb + good
    yield "two directories, the other first", good + bomb
    yield "in front", b"PK\3\4" + bytes(1000) + good
    yield "something after", good + bytes(1000)
    yield "a comment", patched(good, len(good) - 2, struct.pack("<H", 22)) + good[-22:]
    yield "a directory in the comment", patched(good, len(good) - 2, struct.pack("<H", len(bomb))) + bomb
    yield "no end", good[:end]
    yield "only an end", good[end:]
    yield "an end without start", b"PK\3\4" + b"PK\5\6" + struct.pack("<4HLLH", 0, 0, 1, 1, 46, 0, 0)
    for label, at, value in (
        ("count 65535", end + 8, struct.pack("<HH", 65535, 65535)),
        ("count 0", end + 8, struct.pack("<HH", 0, 0)),
        ("size 0", end + 12, struct.pack("<L", 0)),
        ("offset 2^32-1", end + 16, struct.pack("<L", 2**32 - 1)),
        ("disk 1", end + 4, struct.pack("<H", 1)),
        ("locator", end - 12, struct.pack("<Q", 2**63)),
        ("64-bit count", end - 20 - 56 + 32, struct.pack("<Q", 2**63)),
        ("64-bit size", end - 20 - 56 + 40, struct.pack("<Q", 2**64 - 1)),
        ("64-bit offset", end - 20 - 56 + 48, struct.pack("<Q", 2**62)),
        ("method", first + 10, struct.pack("<H", 8)),
        ("encrypted", first + 8, struct.pack("<H", 1)),
        ("entry of 2^32-2", first + 20, struct.pack("<LL", 2**32 - 2, 2**32 - 2)),
        ("entry of 2^32-1", first + 20, struct.pack("<LL", 2**32 - 1, 2**32 - 1)),
        ("entry at the end", first + 42, struct.pack("<L", end)),
        ("entry at 2^32-2", first + 42, struct.pack("<L", 2**32 - 2)),
        ("name of 65535", first + 28, struct.pack("<H", 65535)),
        ("comment of 65535", first + 32, struct.pack("<H", 65535)),
        ("local name", 30, b"other"),
        ("local size", 18, struct.pack("<LL", 7, 7)),
        ("local method", 8, struct.pack("<H", 8)),
    ):
        yield label, patched(good, at, value)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for i in range(70_000):
            file.writestr(f"a/{i}", b"")
    yield "70,000 entries", stream.getvalue()
    yield "overlapping", overlapping(2_000)
    yield "data.pkl twice", twice()
    yield "TorchScript", script()


def overlapping(count: int) -> bytes:
    """One content of 1 MB under `count` names, with all headers in front of it."""
    content, entries = bytes(1 << 20), b""
    header = b"PK\3\4" + struct.pack("<5H3L2H", 0, 0, 0, 0, 0, 0, len(content), len(content), 8, 0) + b"a/data/0"
    for i in range(count):
        label = f"a/data/{i}".encode()
        fields = (0, 0, 0, 0, 0, 0, 0, len(content), len(content), len(label), 0, 0, 0, 0, 0, 0)
        entries += b"PK\1\2" + struct.pack("<6H3L5H2L", *fields) + label
    start = len(header) + len(content)
    return header + content + entries + b"PK\5\6" + struct.pack("<4HLLH", 0, 0, count, count, len(entries), start, 0)


def twice() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for root in ("a", "b"):
            file.writestr(f"{root}/data.pkl", pickled(b"}"))
    return stream.getvalue()


def script() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch.jit
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), stream)
    return stream.getvalue()


@kind
def tensors_files(rng, canary):
    """model.safetensors of a folder, with a false header."""

    def with_header(header: bytes, data: bytes = bytes(16), length: int | None = None) -> dict[str, bytes]:
        size = len(header) if length is None else length
        return folder() | {"model.safetensors": struct.pack("<Q", size) + header + data}

    def entry(**changes) -> bytes:
        return json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}).encode()

    yield from (
        ("empty", folder() | {"model.safetensors": b""}),
        ("length 2^63", with_header(entry(), length=2**63)),
        ("length 2^40", with_header(entry(), length=2**40)),
        ("length beyond", with_header(entry(), length=1000)),
        ("30 MB of spaces", with_header(entry() + b" " * (30 << 20))),
        ("30 MB of tensors", with_header(b"{" + b",".join(b'"%d":{}' % i for i in range(3_000_000)) + b"}")),
        ("1 MB of tensors", with_header(b"{" + b",".join(b'"%d":{}' % i for i in range(100_000)) + b"}")),
        ("nested", with_header(b"[" * (1 << 20))),
        ("nested objects", with_header(b'{"a":' * 200_000)),
        ("a huge number", with_header(b'{"a":' + b"9" * 1_000_000 + b"}")),
        ("many huge numbers", with_header(b'{"a":[' + b",".join([b"9" * 4_000] * 400) + b"]}")),
        ("doubled names", with_header(b'{"a":1,"a":2}')),
        ("NaN", with_header(b'{"a":NaN}')),
        ("no encoding", with_header(b'{"\xff":1}')),
        ("a list", with_header(b"[]")),
        ("dtype", with_header(entry(dtype="F64"))),
        ("unknown dtype", with_header(entry(dtype="float"))),
        ("dtype of no text", with_header(entry(dtype=["F32"]))),
        ("sub-byte dtype", with_header(entry(dtype="F4"))),
        ("shape 2^63", with_header(entry(shape=[2**63]))),
        ("shape product 2^64", with_header(entry(shape=[2**32, 2**32]))),
        ("nothing of 2^62", with_header(entry(shape=[0, 2**62], data_offsets=[0, 0]))),
        ("negative shape", with_header(entry(shape=[-4]))),
        ("negative shapes", with_header(entry(shape=[-2, -2]))),
        ("float shape", with_header(entry(shape=[4.0]))),
        ("bool shape", with_header(entry(shape=[True, 4]))),
        ("offsets beyond", with_header(entry(shape=[8], data_offsets=[0, 32]))),
        ("offsets backwards", with_header(entry(data_offsets=[16, 0]))),
        ("negative offsets", with_header(entry(data_offsets=[-16, 0]))),
        ("three offsets", with_header(entry(data_offsets=[0, 8, 16]))),
        ("a hole", with_header(entry(), bytes(32))),
        ("metadata", with_header(b'{"__metadata__":{"a":{"b":1}}}', b"")),
        ("more keys", with_header(entry(code="x"))),
    )
    weights = {f"w{i}": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for i in range(10_000)}
    yield "overlapping", with_header(json.dumps(weights).encode())


@kind
def descriptions(rng, canary):
    """config.json that is no description."""
    good = folder()
    config = good["config.json"]
    for label, text_ in (
        ("empty", b""),
        ("nested", b"[" * 900_000),
        ("nested objects", b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
        ("a huge number", b'{"a":' + b"9" * 900_000 + b"}"),
        ("a huge exponent", config.replace(b'"num_exits": 2', b'"num_exits": 1e999')),
        ("NaN", config.replace(b'"num_exits": 2', b'"num_exits": NaN')),
        ("Infinity", config.replace(b"2.0", b"Infinity")),
        ("a doubled key", config.replace(b"{", b'{"name": "eenet152", ', 1)),
        ("200,000 keys", b"{" + b",".join(b'"%d":1' % i for i in range(100_000)) + b"}"),
        ("spaces", b" " * (40 << 20) + config),
        ("no encoding", b"\xff\xfe{"),
        ("surrogates", config.replace(b'"eenet8"', b'"\\ud800"')),
        ("surrogate key", config.replace(b"{", b'{"\\ud800": 1, ', 1)),
        ("control characters", config.replace(b'"eenet8"', b'"\\u001b[2J"')),
        ("text", b'"config"'),
        ("two", config + config),
        ("half", config[:80]),
    ):
        yield label, good | {"config.json": text_}
    for key in json.loads(config):
        for value in (None, [], {}, "x" * 100_000, -1, 10**400, [[[]]], True, 1.5):
            if rng.random() < 0.3:
                yield f"{key} = {str(value)[:12]}", folder(**{key: value})


@kind
def amplified(rng, canary):
    """Small files that describe large networks."""
    weights = {
        "stages.0.0.0.weight": torch.zeros(64, 3, 7, 7),
        "heads.0.classifier.weight": torch.zeros(10, 256),
    }
    for depth in (20, 50, 101, 110, 152):
        changes = {"name": f"eenet{depth}", "num_classes": 10, "input_shape": [3, 32, 32], "head": "conv3"}
        content = folder(placement=[3, 6], normalization=None, **changes)
        config = json.loads(content["config.json"])
        del config["filters"]
        yield f"EENet-{depth}", {"config.json": json.dumps(config).encode(), "model.safetensors": safetensors(weights)}
    state = small().state_dict()
    for classes in (10**6, 2**31 - 1):
        yield f"{classes} classes", folder(num_classes=classes)
    for shape in ([1, 65535, 65535], [1, 65535, 32767], [65535, 1, 1], [1, 8, 2**31]):
        yield f"images of {shape}", folder(input_shape=shape)
    for filters in (65535, 2**31):
        yield f"{filters} filters", folder(filters=filters)
    yield "exits at 100,000 blocks", folder(placement=list(range(1, 100_001)))
    yield "a million exits", folder(num_exits=10**6)
    yield "normalization of 50,000 channels", folder(normalization=[[0.5] * 50_000, [1.0] * 50_000])
    other = folder(zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8), filters=4))
    yield "weights of another network", folder() | {"model.safetensors": other["model.safetensors"]}
    yield "weights of another kind", folder(zoo.eenet("eenet20")) | {"model.safetensors": other["model.safetensors"]}
    first = next(iter(state))
    yield (
        "one weight too large",
        saved(
            {**state, first: torch.zeros(2, 1, 3, 3).expand(2, 1, 3, 3), "classifier.0.weight": torch.zeros(3, 10**6)}
        ),
    )
    large = {f"stages.{i}.{j}.conv1.weight": torch.zeros(1) for i in range(30) for j in range(60)}
    yield (
        "1,800 blocks",
        saved(
            large | {"stages.0.0.0.weight": torch.zeros(64, 3, 7, 7), "exits.0.classifier.0.weight": torch.zeros(1, 1)}
        ),
    )


@kind
def attachments(rng, canary):
    """Backbones with exits: config.json and the weights beside it."""
    for label, changes in (
        ("a million classes", {"num_classes": 10**6}),
        ("2^31-1 classes", {"num_classes": 2**31 - 1}),
        ("vit_h_14", {"backbone": "torchvision:vit_h_14", "exits": []}),
        ("regnet_y_128gf", {"backbone": "torchvision:regnet_y_128gf", "exits": []}),
        ("wide_resnet101_2", {"backbone": "torchvision:wide_resnet101_2", "exits": ["layer1"]}),
        ("a detector", {"backbone": "torchvision:fasterrcnn_resnet50_fpn"}),
        ("a video network", {"backbone": "torchvision:r3d_18"}),
        ("a path", {"backbone": "torchvision:../../etc/passwd"}),
        ("a download", {"backbone": "timm:hf-hub:somebody/something"}),
        ("a local download", {"backbone": "timm:local-dir:/tmp"}),
        ("another library", {"backbone": "os:system"}),
        ("no name", {"backbone": 7}),
        ("a long name", {"backbone": "timm:" + "a" * 500_000}),
        ("10,000 exits", {"exits": [f"features.{i}" for i in range(10_000)]}),
        ("the same exit", {"exits": ["features.1"] * 64}),
        ("exits of another kind", {"exits": [1, None]}),
        ("exits as text", {"exits": "features.1"}),
        ("unknown exits", {"exits": ["features.99", "x"]}),
        ("exits in no order", {"exits": ["features.4", "features.1"]}),
        ("one exit", {"exits": ["features.1"]}),
        ("three exits", {"exits": ["features.1", "features.2", "features.4"]}),
        ("other exits", {"exits": ["features.2", "features.3"]}),
        ("large images", {"input_shape": [3, 16384, 16384]}),
        ("larger images", {"input_shape": [3, 65535, 65535]}),
        ("channels", {"input_shape": [65535, 8, 8]}),
        ("flat images", {"input_shape": [3, 32]}),
        ("images as text", {"input_shape": "3x32x32"}),
        ("tiny images", {"input_shape": [3, 1, 1]}),
        ("plain heads", {"head": "plain"}),
        ("conv3 heads", {"head": "conv3"}),
        ("unknown heads", {"head": ["pool"]}),
        ("unknown criterion", {"criterion": {}}),
        ("std 0", {"normalization": [[0.5] * 3, [0, 1, 1]]}),
        ("std of two channels", {"normalization": [[0.5] * 3, [1, 1]]}),
        ("normalization of a number", {"normalization": 0.5}),
        ("format", {"format": 2}),
        ("another key", {"code": "print(1)"}),
        ("classes", {"num_classes": 4}),
        ("classes as a list", {"num_classes": [5]}),
        ("another variant", {"backbone": "timm:mobilenetv3_small_100"}),
    ):
        yield label, attached(**changes)
    good = attached()
    for key in json.loads(good["config.json"]):
        config = json.loads(good["config.json"])
        del config[key]
        yield f"without {key}", good | {"config.json": json.dumps(config).encode()}
    for label, content in (("empty", b""), ("nested", b"[" * 900_000), ("a list", b"[]"), ("null", b"null")):
        yield label, good | {"config.json": content}
        yield f"weights {label}", good | {"model.safetensors": content}
    yield "damaged weights", good | {"model.safetensors": good["model.safetensors"][:100_000]}
    yield "no weights", {"config.json": good["config.json"]}
    yield "weights of an EENet", folder() | {"config.json": good["config.json"]}
    for kind_ in ("eenet", "EENet", "x" * 10**5, None, [], {}, 1):
        yield f"of the kind {str(kind_)[:9]}", attached(kind=kind_)
    old = attached_in_the_old_format()
    for label, content in (("empty", b""), ("a list", b"[]"), ("of another kind", b'{"kind": "eenet"}')):
        yield f"old and {label}", old | {"attached.json": content}


@kind
def special(rng, canary):
    """What is no regular file."""

    def link(target: str):
        return lambda path: path.symlink_to(target)

    def sparse(size: int, start: bytes = b""):
        def make(path: Path):
            path.write_bytes(start)
            os.truncate(path, size)

        return make

    def listen(path: Path):
        with socket.socket(socket.AF_UNIX) as s:
            s.bind(str(path))

    def inside(file: str, make: Callable[[Path], object], content=folder):
        def build(path: Path):
            path.mkdir()
            for name_, bytes_ in content().items():
                if name_ != file:
                    (path / name_).write_bytes(bytes_)
            make(path / file)

        return build

    for device in (
        "/dev/zero",
        "/dev/urandom",
        "/dev/null",
        "/dev/tty",
        "/proc/self/mem",
        "/proc/self/maps",
        "/proc/kcore",
    ):
        yield f"a link to {device}", link(device)
    yield "a pipe", os.mkfifo
    yield "a socket", listen
    yield "a broken link", link("nothing")
    yield "a link to itself", link("model.pt")
    yield "an empty folder", Path.mkdir
    yield "1 GB of nothing", sparse(10**9)
    yield "1 TB of nothing", sparse(10**12)
    yield "a start and 10 GB of nothing", sparse(10**10, saved(small().state_dict()))
    yield "an old start and 10 GB of nothing", sparse(10**10, saved(small().state_dict(), old=True))
    for file in ("config.json", "model.safetensors"):
        for label, make in (
            ("a pipe", os.mkfifo),
            ("zeros", link("/dev/zero")),
            ("a folder", Path.mkdir),
            ("a socket", listen),
            ("10 GB of nothing", sparse(10**10, struct.pack("<Q", 2))),
        ):
            yield f"{file} is {label}", inside(file, make)
    yield "attached.json is zeros", inside("attached.json", link("/dev/zero"), attached_in_the_old_format)
    yield "attached weights are a pipe", inside("model.safetensors", os.mkfifo, attached)


@kind
def values(rng, canary):
    """Numbers that no trained network has."""
    for label, value in (("NaN", float("nan")), ("infinite", float("inf")), ("-infinite", float("-inf"))):
        for key in ("stages.0.0.0.weight", "stages.1.0.residual.0.running_var", "heads.0.classifier.bias"):
            net = zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8))
            net.state_dict()[key].view(-1)[-1] = value
            yield f"{key} {label}", folder(net)
        state = small().state_dict()
        state["conv2d_6.weight"].view(-1)[0] = value
        yield f"reference {label}", saved(state)
    net = zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8))
    net.state_dict()["stages.1.0.residual.0.running_var"].fill_(-1)
    yield "negative variance", folder(net)
    net = zoo.eenet("eenet8", num_classes=3, input_shape=(1, 8, 8))
    net.thresholds.fill_(float("nan"))
    yield "NaN thresholds", folder(net)
    for std in (0, -1, 1e39, "1", None, True):
        yield f"std {std}", folder(normalization=[[0.5], [std]])


@kind
def others(rng, canary):
    """Files of other formats, and of torch.save with other content."""
    net = zoo.eenet("eenet8")
    yield "state_dict of eefast", saved(net.state_dict())
    yield (
        "Lightning's of eefast",
        saved({"state_dict": {f"net.{k}": v for k, v in net.state_dict().items()}, "epoch": 1}),
    )
    yield "a module", saved(nn.Linear(3, 2))
    yield "an optimizer", saved(torch.optim.SGD([nn.Parameter(torch.zeros(3))]).state_dict())
    for label, thing in (
        ("a tensor", torch.zeros(3)),
        ("a list", [torch.zeros(3)]),
        ("nothing", None),
        ("numbers for names", {0: torch.zeros(1)}),
        ("sparse", {"stages.0.0.0.weight": torch.zeros(2, 2).to_sparse()}),
        ("complex", {"stages.0.0.0.weight": torch.zeros(2, 2, 3, 3, dtype=torch.complex64)}),
        ("meta", {"stages.0.0.0.weight": torch.zeros(2, 2, device="meta")}),
        ("float8", {"stages.0.0.0.weight": torch.zeros(2, 2, 3, 3, dtype=torch.float8_e5m2)}),
        ("numpy", {"stages.0.0.0.weight": np.zeros((2, 2))}),
        ("surrogates", {"\ud800" * 10: torch.zeros(1)}),
        ("long names", {"stages." * 100_000 + "0.0.0.weight": torch.zeros(1)}),
        (
            "many digits",
            {f"exits.{'9' * 5000}.classifier.0.weight": torch.zeros(1), "stages.0.0.0.weight": torch.zeros(1)},
        ),
        ("prefixes", {f"{'module.' * 5000}stages.0.0.0.weight": torch.zeros(1)}),
        ("many prefixes", {f"{i}.stages.0.0.0.weight": torch.zeros(1) for i in range(3_000)}),
    ):
        yield label, saved(thing)
    for label, content in (
        ("empty", b""),
        ("HTML", b"<!DOCTYPE html><html>404</html>"),
        ("a pointer of git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("zeros", bytes(10**7)),
        ("noise", rng.randbytes(10**6)),
        ("gzip", b"\x1f\x8b" + bytes(100)),
        ("npy", b"\x93NUMPY" + bytes(100)),
        ("an ELF", b"\x7fELF" + bytes(100)),
        ("a plain pickle", pickle.dumps({"a": [1, 2]}, protocol=5)),
        ("a pickle of protocol 0", pickle.dumps({"a": [1, 2]}, protocol=0)),
        ("a zip", zipfile_of("readme.txt")),
    ):
        yield label, content


def zipfile_of(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for n in names:
            file.writestr(n, b"content")
    return stream.getvalue()


@kind
def damaged(rng, canary):
    """Good files cut short or with a few other bytes."""
    good = [content for _, content in controls()]
    for i in range(60):
        content = rng.choice(good)
        key = rng.choice(list(content)) if isinstance(content, dict) else None
        data = bytearray(content if key is None else content[key])
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randrange(1, 8) if data else 0):
            data[rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 1000))] = rng.randrange(256)
        yield f"{i}", bytes(data) if key is None else content | {key: bytes(data)}


# The process that loads them.

SECONDS, SECONDS_PER_BYTE = 2.0, 1e-8
BYTES, BYTES_PER_BYTE = 200e6, 4
PATIENCE = 60.0
"""Seconds after which a load is taken for stuck; the limits above are on processor time, as machines may be busy."""


@dataclass(frozen=True)
class Outcome:
    """How a load ended, what it said, and what it took: processor seconds and bytes of memory, beside the limits."""

    error: str
    message: str
    seconds: float
    grown: float
    size: int
    executed: bool = False

    def faults(self, loads: bool) -> list[str]:
        found = [] if self.error in ("", "CheckpointError") else [f"left as {self.error}: {self.message}"]
        if loads and self.error:
            found.append(f"does not load: {self.message}")
        if self.executed:
            found.append("executed code")
        if self.seconds > SECONDS + SECONDS_PER_BYTE * self.size:
            found.append(f"took {self.seconds:.1f} s")
        if self.grown > BYTES + BYTES_PER_BYTE * self.size:
            found.append(f"took {self.grown / 1e6:.0f} MB for {self.size / 1e6:.1f} MB")
        return found


def size_of(path: Path) -> int:
    """Bytes that are stored in a file or folder."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(min(s.st_size, s.st_blocks * 512) for p in paths if p.is_file() for s in [p.stat()])


class Loader:
    """A process that calls `eefast.load`, replaced where it does not come back."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, __file__, "--load"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd="/")

    def load(self, path: Path) -> Outcome:
        if self.process is None:
            self.start()
        size = size_of(path)
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(str(path)) + "\n")
            self.process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            answered = selector.select(PATIENCE + SECONDS_PER_BYTE * size)
        line = self.process.stdout.readline() if answered else ""
        if not line:
            self.close()
            return Outcome("a stuck or ended process", "", PATIENCE, 0, size, self.canary.exists())
        if not line.startswith("{"):
            raise AssertionError(f"loading printed {line!r}")
        return Outcome(**json.loads(line), size=size, executed=self.canary.exists())

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            with suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def serve() -> None:
    """Loads the paths that come in, line by line, and answers with what each took."""
    import torchvision  # noqa: F401 (not what a file takes)
    from timm import list_models
    from torch.utils import flop_counter  # noqa: F401

    import eefast

    list_models()
    torch.set_num_threads(1)
    limit = memory("VmSize") + (6 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        path = Path(json.loads(line))
        Path("/proc/self/clear_refs").write_text("5")
        before, start = memory("VmRSS"), time.process_time()
        error = message = ""
        try:
            net = eefast.load(path, **({} if path.is_dir() else {"input_shape": (1, 8, 8)}))
            del net
        except BaseException as caught:
            error, message = type(caught).__name__, str(caught)[:300]
        seconds = time.process_time() - start
        answer = {"error": error, "message": message, "seconds": seconds, "grown": memory("VmHWM") - before}
        print(json.dumps(answer), flush=True)


def memory(field: str) -> int:
    """Bytes of this process, from Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def attempt(loader: Loader, file: File) -> Outcome:
    with tempfile.TemporaryDirectory() as place:
        return loader.load(file.write(Path(place)))


def main(seed: int, kinds: list[str], verbose: bool) -> int:
    """Number of faults, each printed, in the files of `kinds`, or of all."""
    bad, results = 0, collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        canary = Path(place) / "canary"
        loader = Loader(canary)
        for _, content in controls():
            attempt(loader, File("control", "", content))
        for file in (file for kind in kinds or ["control", *KINDS] for file in files(kind, seed, canary)):
            outcome = attempt(loader, file)
            canary.unlink(missing_ok=True)
            results[file.kind].append(outcome)
            if verbose:
                took = f"{outcome.seconds:.2f} s, {outcome.grown / 1e6:.0f} MB of {outcome.size / 1e6:.1f} MB"
                print(f"{file.kind}: {file.label}: {took}: {outcome.message or 'loaded'}", flush=True)
            for fault in outcome.faults(file.loads):
                bad += 1
                print(f"FAULT {file.kind}: {file.label}: {fault}")
        loader.close()
    print(f"{'kind':16} files loaded  worst s  worst MB  MB beyond 4 × size")
    for kind_, outcomes in results.items():
        loaded = sum(not o.error for o in outcomes)
        worst = max(o.seconds for o in outcomes), max(o.grown for o in outcomes) / 1e6
        beyond = max(o.grown - BYTES_PER_BYTE * o.size for o in outcomes) / 1e6
        print(f"{kind_:16} {len(outcomes):5} {loaded:6} {worst[0]:8.2f} {worst[1]:9.0f} {beyond:9.0f}")
    kinds_ = len(results.keys() - {"control"})
    print(f"{sum(map(len, results.values()))} files, {kinds_} kinds and controls; {bad} faults")
    return bad


if __name__ == "__main__":
    if sys.argv[1:] == ["--load"]:
        serve()
    else:
        parser = argparse.ArgumentParser(description="Load hostile files; exit code 1 where a limit was not kept.")
        parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--verbose", action="store_true", help="one line per file")
        chosen = parser.parse_args()
        sys.exit(main(chosen.seed, chosen.kinds, chosen.verbose) > 0)
