"""Files of unknown origin → bytes, JSON and tensors, read within limits."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from eefast.checkpoint import stored
from eefast.checkpoint.loading import CheckpointError, load


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """Between the check of the path and the opening, another process replaces the file."""
    path = tmp_path / "model.pt"
    path.write_bytes(b"PK\3\4")
    opened = os.open

    def exchange(name, flags, *more):
        if str(name) == str(path):
            path.unlink()
            os.mkfifo(path)
        return opened(name, flags, *more)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises(CheckpointError, match="is a pipe; only a regular file is read"):
        load(path, input_shape=(1, 8, 8))


def test_a_refused_file_leaves_nothing_open(tmp_path):
    before = len([*Path("/proc/self/fd").iterdir()])
    (tmp_path / "half.pt").write_bytes(b"PK\3\4")
    os.mkfifo(tmp_path / "pipe.pt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket.pt"))
    for name in ("half.pt", "pipe.pt", "socket.pt"):
        with pytest.raises(CheckpointError):
            load(tmp_path / name)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


def test_a_regular_file_is_read_whole(tmp_path):
    (tmp_path / "x").write_bytes(bytes(range(200)))
    seen = []
    assert stored.read(tmp_path / "x", 200, seen.append) == bytes(range(200))
    assert seen == [bytes(range(16))]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(bytes(6)), "x has 6 bytes; at most 5 are read"),
        (lambda path: path.mkdir(), "x is a folder; only a regular file is read"),
        (os.mkfifo, "x is a pipe; only a regular file is read"),
    ],
    ids=["large", "folder", "pipe"],
)
def test_other_files_are_refused(tmp_path, make, message):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=message):
        stored.read(tmp_path / "x", 5)


def test_a_file_with_holes_is_refused(tmp_path):
    """It takes no disk, but memory."""
    path = tmp_path / "x"
    path.write_bytes(b"begin")
    os.truncate(path, 64 << 20)
    with pytest.raises(ValueError, match=r"x is a sparse file: 67108864 bytes, of which \d+ are stored"):
        stored.read(path)


def test_a_file_that_becomes_shorter_is_said(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with pytest.raises(ValueError, match="x has become shorter while it was read; try again"):
        stored.read(path, check=lambda start: os.truncate(path, 50))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[]", "x holds no JSON object"),
        (b"{", "x is not JSON"),
        (b"\xff", "x is not JSON"),
        (b"[" * 100_000, "x is not JSON"),
        (b'{"a": NaN}', "x is not JSON .NaN is no number of JSON"),
        (b'{"a": -Infinity}', "x is not JSON .-Infinity is no number of JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "x is not JSON .the key 'a' occurs twice"),
    ],
    ids=["list", "cut off", "no text", "deep", "NaN", "infinity", "key twice"],
)
def test_what_is_no_json_object_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        stored.parse_json(text, "x")


def safetensors(*entries: tuple[str, object], body: int = 8) -> bytes:
    """A header with these entries, before `body` bytes."""
    header = json.dumps(dict(entries)).encode()
    return len(header).to_bytes(8, "little") + header + bytes(body)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8), **more: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def test_tensors_come_back_as_safetensors_wrote_them(tmp_path):
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e5m2)
    expected = {str(dtype): torch.arange(7).to(dtype) for dtype in dtypes} | {"empty": torch.zeros(3, 0)}
    content = save(expected, {"written": "here"})
    (tmp_path / "x.safetensors").write_bytes(content)
    got, size = stored.read_safetensors(tmp_path / "x.safetensors")
    assert size == len(content)
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert (value.dtype, value.shape) == (expected[name].dtype, expected[name].shape)
        assert torch.equal(value.double(), expected[name].double()), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(bytes(7), "it is shorter than its header", id="short"),
        pytest.param(b"\xff" * 8 + b"{}", "it is shorter than its header", id="long header"),
        pytest.param(safetensors(("a", 1)), "'a' must have exactly dtype, shape and data_offsets", id="no entry"),
        pytest.param(safetensors(("a", entry(more=1))), "'a' must have exactly", id="unknown key"),
        pytest.param(safetensors(("a", entry("F4"))), "'a' has the dtype 'F4', which is not supported", id="dtype"),
        pytest.param(
            safetensors(("a", entry(["F32"]))), "'a' has the dtype .*, which is not supported", id="dtype is no text"
        ),
        pytest.param(safetensors(("a", entry(shape=[-2]))), "'a' has no shape or no data_offsets", id="shape"),
        pytest.param(safetensors(("a", entry(shape=[True, 2]))), "'a' has no shape", id="shape is no number"),
        pytest.param(safetensors(("a", entry(offsets=[0]))), "'a' has no shape or no data_offsets", id="one offset"),
        pytest.param(safetensors(("a", entry(shape=[3]))), "'a' has another number of bytes than", id="bytes"),
        pytest.param(
            safetensors(("a", entry()), ("b", entry())), "'b' does not begin where the tensor before it", id="twice"
        ),
        pytest.param(safetensors(("a", entry(offsets=[4, 12])), body=12), "'a' does not begin", id="hole"),
        pytest.param(safetensors(("a", entry()), body=9), "its tensors do not fill it", id="rest"),
        pytest.param(safetensors(("a", entry()), body=7), "its tensors do not fill it", id="cut off"),
    ],
)
def test_damaged_safetensors_say_where(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.safetensors is damaged .{message}.*; save the network again"):
        stored.read_safetensors(tmp_path / "x.safetensors")


def test_a_long_header_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MOST_HEADER", 10)
    (tmp_path / "x.safetensors").write_bytes(safetensors(("a", entry())))
    with pytest.raises(ValueError, match=r"its header has \d+ bytes; at most 10 are read"):
        stored.read_safetensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("offset", [4, 5], ids=["aligned", "unaligned"])
def test_a_view_shares_memory_where_it_can(offset):
    values = torch.arange(6, dtype=torch.float32)
    data = bytearray(offset) + bytearray(values.numpy().tobytes())
    assert torch.equal(stored.view(data, torch.float32, offset, (2, 3)), values.view(2, 3))
    assert torch.equal(stored.view(data, torch.float32, offset, (3, 2), (1, 3)), values.view(2, 3).T)
    assert stored.view(data, torch.float32, offset, (0, 3)).shape == (0, 3)
    got = stored.view(data, torch.float32, offset, (6,))
    data[offset:] = bytes(24)
    assert torch.equal(got, torch.zeros(6) if offset == 4 else values)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("a.weight", [1, torch.nan], "the weight a.weight holds NaN or infinite numbers"),
        ("a.weight", [1, torch.inf], "the weight a.weight holds NaN or infinite numbers"),
        ("a.weight", [1, -torch.inf], "the weight a.weight holds NaN or infinite numbers"),
        ("heads.0.confidence.bias", [torch.nan], "the weight heads.0.confidence.bias holds NaN"),
        ("a.running_var", [1, -0.5], "a.running_var holds the negative variance -0.5"),
    ],
)
def test_weights_that_are_not_finite_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        stored.check_finite({"first": torch.ones(2), name: torch.tensor(value)})


def test_what_may_be_infinite_or_negative_passes():
    infinite = torch.tensor([torch.inf, -torch.inf])
    stored.check_finite({"thresholds": infinite, "heads.0.confidence.bias": infinite, "a.weight": -torch.ones(2)})
    stored.check_finite({"none": torch.zeros(0), "a.running_var": torch.zeros(2), "count": torch.tensor(-1)})


@pytest.mark.parametrize(
    ("text", "shown"), [("a", "'a'"), ("a\n\x1b", r"'a\n\x1b'"), ("a" * 81, f"'{'a' * 79}…'")], ids=["", "odd", "long"]
)
def test_names_of_a_file_are_quoted(text, shown):
    assert stored.quoted(text) == shown
