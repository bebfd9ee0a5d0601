"""Zip files → the places of their entries; what `torch.save` does not write is refused."""

import io
import warnings
import zipfile

import pytest
import torch
from torch_files import archive

from eefast.checkpoint import archive as archive_module
from eefast.checkpoint.archive import entries
from eefast.checkpoint.loading import CheckpointError, load

TWO = archive(a=b"first", b=b"second")
END, DIRECTORY = len(TWO) - 22, TWO.index(b"PK\1\2")


def saved() -> bytes:
    """A file of `torch.save`, whose directory has a second end with numbers of 64 bits."""
    stream = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": torch.zeros(0)}, stream)
    return stream.getvalue()


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def twice(name: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in (b"one", b"two"):
            file.writestr(name, content)
    return stream.getvalue()


def overlapping() -> bytes:
    """The entry b, with its header, is in the content of a, where the directory says that it is."""
    alone = archive(b=b"second")
    inside = alone[: alone.index(b"PK\1\2")]
    data = archive(a=inside, b=b"second")
    place = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1) + 42
    return patched(data, place, data.index(inside).to_bytes(4, "little"))


@pytest.mark.parametrize("data", [TWO, archive(), saved()], ids=["two", "none", "of torch.save"])
def test_entries_are_where_another_reader_finds_them(data):
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        expected = {name: file.read(name) for name in file.namelist()}
    found = {name: data[begin : begin + size] for name, (begin, size) in entries(bytearray(data)).items()}
    assert found == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "does not end as zip files of torch.save do", id="empty"),
        pytest.param(TWO[:-1], "does not end as zip files of torch.save do", id="cut off"),
        pytest.param(TWO + b"x", "does not end as zip files of torch.save do", id="bytes after it"),
        pytest.param(b"x" + TWO, "its directory is not where it says", id="bytes before it"),
        pytest.param(patched(TWO, END + 4, b"\1"), "its directory is not where it says", id="several disks"),
        pytest.param(patched(TWO, END + 8, b"\3\0\3\0"), "its directory is not where it says", id="an entry too many"),
        pytest.param(patched(TWO, END + 8, b"\1\0\1\0"), "does not end where it says", id="an entry too few"),
        pytest.param(patched(saved(), len(saved()) - 66, b"\1"), "contradict each other", id="two ends"),
        pytest.param(twice("archive/a"), "'archive/a' is in its directory twice", id="twice"),
        pytest.param(
            archive(zipfile.ZIP_DEFLATED, a=bytes(99)), "'archive/a' is compressed, 99 bytes", id="compressed"
        ),
        pytest.param(patched(TWO, DIRECTORY + 20, b"\4"), "is 5 bytes packed into 4", id="two sizes"),
        pytest.param(patched(TWO, DIRECTORY + 8, b"\1"), "or its entries are encrypted", id="encrypted"),
        pytest.param(patched(TWO, DIRECTORY + 46, b"\xff"), "its zip directory is cut off or damaged", id="no name"),
        pytest.param(TWO.replace(b"archive/a", b"archive/c", 1), "or contradicts it", id="another name"),
        pytest.param(patched(TWO, 8, b"\x08"), "or contradicts it", id="another method"),
        pytest.param(overlapping(), "its entries overlap", id="overlapping"),
    ],
)
def test_what_torch_save_does_not_write_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        entries(bytearray(data))


def test_the_number_of_entries_is_limited(monkeypatch):
    monkeypatch.setattr(archive_module, "MOST_ENTRIES", 1)
    with pytest.raises(ValueError, match="it has 2 entries; at most 1 are read"):
        entries(bytearray(TWO))


def test_an_archive_that_unpacks_to_more_than_itself_is_refused_unread(tmp_path):
    content = archive(zipfile.ZIP_DEFLATED, data__0=bytes(10**7), data_pkl=b"\x80\x02]q\x00.", version=b"3")
    (tmp_path / "bomb.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is compressed, 10000000 bytes packed into"):
        load(tmp_path / "bomb.pt")
