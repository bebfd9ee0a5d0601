"""Image files of all kinds → 8-bit RGB as torchvision reads them, or an error that names the file."""

import os
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import photograph, ramp
from PIL import Image
from torch._utils import ExceptionWrapper
from torchvision.datasets.folder import pil_loader

from eefast.data.decoding import decode, decode_bytes, size_of
from eefast.data.image_files import IMAGE_SUFFIXES, ImageFileError, shown


def png16(path: Path, values: np.ndarray) -> None:
    """A PNG of 16 bits per channel, written by the book: [H, W, channels]."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[values.shape[2]]

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">2I5B", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def tiff(path: Path, values: np.ndarray, bits: int, photometric: int, order: str) -> None:
    """A grey TIFF without compression, written by the book; values are packed as they come."""
    body = values.astype(f"{order}u2").tobytes()
    if bits == 12:
        text = "".join(f"{v:012b}" for v in values.flatten())
        body = bytes(int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8))
    tags = [(256, values.shape[1]), (257, values.shape[0]), (258, bits), (259, 1), (262, photometric)]
    tags += [(273, 8), (277, 1), (278, values.shape[0]), (279, len(body))]
    start = 8 + len(body) + len(body) % 2
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start) + body + b"\0" * (len(body) % 2)
    out += struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        # Short numbers are in the first of their four bytes.
        out += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    path.write_bytes(out + b"\0\0\0\0")


def grey_of_16_bits(kind: str, path: Path, values: np.ndarray) -> np.ndarray:
    """Write [H, W] values 0 … 65535 and return those of 8 bits that are to be read."""
    if kind == "png":
        png16(path, values[:, :, None])
    elif kind == "pgm":
        path.write_bytes(b"P5\n%d %d\n65535\n" % values.shape[::-1] + values.astype(">u2").tobytes())
    elif kind == "pgm of 12 bits":
        values = values >> 4
        path.write_bytes(b"P5\n%d %d\n4095\n" % values.shape[::-1] + values.astype(">u2").tobytes())
        return (values * 65535 / 4095 / 256).astype(np.uint8)
    elif kind == "tiff of 12 bits":
        tiff(path, values >> 4, 12, 1, "<")
    elif kind == "tiff, white is zero":
        tiff(path, 65535 - values, 16, 0, "<")
    else:
        tiff(path, values, 16, 1, ">" if kind == "tiff, big-endian" else "<")
    return (values // 256).astype(np.uint8)


@pytest.mark.parametrize(
    "kind", ["png", "pgm", "pgm of 12 bits", "tiff", "tiff, big-endian", "tiff of 12 bits", "tiff, white is zero"]
)
def test_grey_of_16_bits_keeps_its_shades(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"x.{kind[:4].rstrip(',')}"
    values = ramp(24, 22, 65535).astype(np.int64)
    expected = grey_of_16_bits(kind, path, values)
    found = decode(path)
    assert found.mode == "RGB"
    read = np.asarray(found)
    assert read.shape == (24, 22, 3)
    assert np.array_equal(read, np.repeat(expected[:, :, None], 3, axis=2))
    assert len(np.unique(read)) == 256


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_all_pngs_of_16_bits_are_read_alike(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(channels).integers(0, 65536, (7, 9, channels))
    png16(tmp_path / "x.png", values)
    colours = values[:, :, :1].repeat(3, axis=2) if channels < 3 else values[:, :, :3]
    assert np.array_equal(np.asarray(decode(tmp_path / "x.png")), colours >> 8)


def test_eight_bits_in_a_file_of_16_are_not_read_as_black(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    png16(path, ramp(5, 7, 255).astype(np.int64)[:, :, None])
    with pytest.raises(ImageFileError, match=r"x\.png .*reach 255 of 65535 only, .*; save it with 8 bits"):
        decode(path)
    png16(path, np.zeros((5, 7, 1), dtype=np.int64))
    assert not np.asarray(decode(path)).any()


@pytest.mark.parametrize(
    ("values", "read"),
    [
        (ramp(5, 7, 255).astype(np.int32), True),
        (ramp(5, 7, 255).round().astype(np.float32), True),
        (np.zeros((5, 7), np.float32), True),
        (ramp(5, 7, 65535).astype(np.int32), False),
        (ramp(5, 7, 255).astype(np.int32) - 1, False),
        (ramp(5, 7, 1).astype(np.float32), False),
        (ramp(5, 7, 256).astype(np.float32), False),
        (np.full((5, 7), np.nan, np.float32), False),
    ],
)
def test_numbers_without_a_scale_are_refused(tmp_path: Path, values: np.ndarray, read: bool) -> None:
    path = tmp_path / "x.tif"
    Image.fromarray(values).save(path)
    if read:
        assert np.array_equal(np.asarray(decode(path)), np.repeat(values[:, :, None].astype(np.uint8), 3, axis=2))
        return
    with pytest.raises(ImageFileError, match=r"x\.tif cannot be read .*no agreed scale to 8 bits; save it with 8 bits"):
        decode(path)


def write(mode: str, path: Path) -> None:
    image = photograph().convert("RGBA") if mode in ("RGBA", "LA", "PA") else photograph()
    if mode == "RGBA":
        image.putalpha(Image.fromarray(ramp(30, 41, 255).astype(np.uint8)))
    if mode == "P with transparency":
        image.convert("P").save(path, transparency=bytes(range(256)))
        return
    if mode == "LAB":
        Image.merge("LAB", image.split()).save(path)
        return
    image.convert("L").convert(mode).save(path) if mode in ("LA", "PA") else image.convert(mode).save(path)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *[(mode, "png") for mode in ("1", "L", "LA", "P", "P with transparency", "RGB", "RGBA")],
        *[(mode, "tif") for mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "P")],
        *[(mode, "jpg") for mode in ("L", "RGB", "CMYK", "YCbCr")],
        *[("RGB", suffix) for suffix in ("bmp", "ppm", "webp", "gif", "TIFF", "Jpeg", "JPG")],
        *[("RGBA", "webp"), ("1", "pbm"), ("L", "pgm")],
    ],
)
@pytest.mark.filterwarnings("error")
def test_eight_bits_are_read_as_torchvision_reads_them(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    write(mode, path)
    assert path.suffix.lower() in IMAGE_SUFFIXES
    found = decode(path)
    assert found.mode == "RGB"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        assert np.array_equal(np.asarray(found), np.asarray(pil_loader(str(path))))


@pytest.mark.parametrize("suffix", ["gif", "tiff", "png", "webp"])
def test_the_first_picture_of_several(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    more = {"lossless": True} if suffix == "webp" else {}
    photograph(seed=1).save(path, save_all=True, append_images=[photograph(seed=2)], **more)
    read = np.asarray(decode(path))
    alone = Image.open(path)
    alone.seek(0)
    assert getattr(alone, "n_frames", 1) == 2
    assert np.array_equal(read, np.asarray(alone.convert("RGB")))


def test_content_counts_and_orientation_does_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph().save(tmp_path / "png.jpg", "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(tmp_path / "png.jpg")), np.asarray(photograph()))


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "head": lambda content: content[:20],
    "text": lambda content: b"not an image",
    "html": lambda content: b"<!DOCTYPE html><html>404</html>",
    "mac": lambda content: b"\0\5\x16\7\0\2\0\0Mac OS X        ",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp", "ppm"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_file_is_named(tmp_path: Path, damage: str, suffix: str) -> None:
    path = tmp_path / f"so so\n.{suffix}"
    photograph().save(path)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(ImageFileError) as raised:
        decode(path)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/so so\\n.{suffix} cannot be read as an image (")
    assert message.endswith("; replace it, or take it out of the data folder")
    assert "\n" not in message
    # As a worker process hands it on.
    try:
        decode(path)
    except ImageFileError:
        handed_on = ExceptionWrapper(sys.exc_info(), where="in DataLoader worker process 0")
    with pytest.raises(ImageFileError, match=f"^{re.escape(message)}$"):
        handed_on.reraise()


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match=r"gone\.png cannot be read as an image \(.*No such file"):
        decode(tmp_path / "gone.png")


def test_names_that_cannot_be_printed(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 \xc3\xa9.png")
    assert shown(path) == f"{tmp_path}/caf\\udce9 é.png"
    with pytest.raises(ImageFileError) as raised:
        decode(path)
    str(raised.value).encode()
    photograph().save(path)
    assert decode(path).size == (41, 30)


@pytest.mark.filterwarnings("ignore:Image size")
def test_huge_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photograph().save(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30 * 41 - 1)
    with pytest.warns(Image.DecompressionBombWarning, match=r"big\.png has 1,230 pixels"):
        decode(tmp_path / "big.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with pytest.raises(ImageFileError, match=r"big\.png cannot be read .*decompression bomb"):
        decode(tmp_path / "big.png")


def test_contents_are_read_as_files_are(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    photograph(30, 41).save(path)
    assert np.array_equal(np.asarray(decode_bytes(path.read_bytes(), "x")), np.asarray(decode(path)))
    assert size_of(path) == (41, 30)
    path.write_bytes(path.read_bytes()[:20])
    assert size_of(path) is size_of(tmp_path / "nothing.png") is None
    with pytest.raises(ImageFileError, match=r"^shard-3/key cannot be read as an image"):
        decode_bytes(path.read_bytes(), "shard-3/key")
    with pytest.raises(ImageFileError, match="it is empty"):
        decode_bytes(b"", "x")
