"""Tar files: keys as webdataset makes them, contents by their offsets, damaged archives."""

import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from eefast.scoring.image_tars import ImageTars


def write(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, BytesIO(content))
    return path


def read(source: ImageTars, folder: Path, shard_size: int = 3) -> tuple[dict[str, bytes], list[int]]:
    with (folder / "listing").open("wb") as listing:
        shards = source.plan(shard_size, listing)
    chunks = [chunk for shard in reversed(shards) for chunk in source.chunks(shard, 2, folder / "listing")]
    found = {name: image for chunk in chunks for name, image in zip(chunk.ids, chunk.images, strict=True)}
    return found, [shard.count for shard in shards]


def test_images_by_key(tmp_path: Path) -> None:
    contents = {f"a.b/{i}.seg.jpg" if i % 2 else f"ü/{i}.PNG": bytes([i]) * (i * 300) for i in range(7)}
    parts = [dict(list(contents.items())[:4]), dict(list(contents.items())[4:])]
    paths = []
    for i, part in enumerate(parts):
        with_labels = {**part, **{f"{name.partition('.')[0]}.cls": b"3" for name in part if name.startswith("ü")}}
        paths.append(write(tmp_path / f"{i}.tar", with_labels))
    found, counts = read(ImageTars(paths, None), tmp_path)
    keys = {f"a.b/{i}" if i % 2 else f"ü/{i}": bytes([i]) * (i * 300) for i in range(7)}
    assert found == keys
    assert counts == [3, 3, 1]


def test_several_images_of_a_key(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tar", {"1.jpg": b"one", "1.mask.png": b"mask", "2.jpg": b"two"})
    with pytest.raises(ValueError, match=r"two images have the id '1'; .* by --image-column jpg"):
        read(ImageTars([path], None), tmp_path)
    assert read(ImageTars([path], "jpg"), tmp_path)[0] == {"1": b"one", "2": b"two"}


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_no_images(tmp_path: Path, kind: bytes) -> None:
    path = write(tmp_path / "x.tar", {"1.jpg": b"one"})
    with tarfile.open(path, "a") as archive:
        for name in ("1.cls", "2.jpg"):  # the first is no image
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "1.jpg"
            archive.addfile(info)
    with pytest.raises(ValueError, match=r"2\.jpg is a link to 1\.jpg; make the tar file with --dereference"):
        read(ImageTars([path], None), tmp_path)


@pytest.mark.parametrize(
    "how", ["compressed", "cut off", "no tar", "a flipped byte", "cut at a header", "in a header", "a hole", "joined"]
)
def test_damaged_archives(tmp_path: Path, how: str) -> None:
    members = {f"{i}.jpg": b"1" * 3000 for i in range(3)}  # of 512 + 3,072 bytes each
    path = write(tmp_path / "x.tar", members, "w:gz" if how == "compressed" else "w")
    whole, second = path.read_bytes(), 512 + 3072
    if how == "cut off":
        path.write_bytes(whole[:700])
    elif how == "a flipped byte":
        path.write_bytes(whole[: second + 9] + b"x" + whole[second + 10 :])
    elif how in ("cut at a header", "in a header"):
        path.write_bytes(whole[: second + 100 * (how == "in a header")])
    elif how == "a hole":
        path.write_bytes(whole[:second] + bytes(1024) + whole[second + 1024 :])
    elif how == "joined":
        path.write_bytes(2 * whole)
    elif how == "no tar":
        path.write_bytes(b"nothing" * 200)
    with pytest.raises(ValueError, match=r"x\.tar is no whole, uncompressed tar file"):
        read(ImageTars([path], None), tmp_path)
