"""A folder's images: ids, order, shards; odd names and links."""

import os
from pathlib import Path

import pytest

from eefast.scoring.image_folder import ImageFolder, printable


def test_paths_are_ids(pictures: Path, tmp_path: Path) -> None:
    source = ImageFolder(pictures)
    with (tmp_path / "listing").open("wb") as listing:
        shards = source.plan(7, listing)
    assert [shard.count for shard in shards] == [7, 7, 7, 2]
    # Each shard is read alone, the last one first.
    read = {shard.number: list(source.chunks(shard, 3, tmp_path / "listing")) for shard in reversed(shards)}
    ids = [name for number in range(4) for chunk in read[number] for name in chunk.ids]
    assert ids == sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.*"))
    assert [len(chunk.ids) for chunk in read[0]] == [3, 3, 1]
    assert all(path == pictures / name for chunk in read[1] for name, path in zip(chunk.ids, chunk.images, strict=True))


def test_the_listing_changes_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"1")
    listings = []
    for content in (b"1", b"22"):
        (tmp_path / "in" / "a.png").write_bytes(content)
        with (tmp_path / "listing").open("wb") as listing:
            ImageFolder(tmp_path / "in").plan(7, listing)
        listings.append((tmp_path / "listing").read_bytes())
    assert listings[0] != listings[1]


def test_odd_names_and_links(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    names = [b"\xc3\xa4 \xe2\x98\x83.png", b"line\nbreak.png", b"bytes\xff.png", b'quote".png']
    for name in names:
        Path(os.fsdecode(os.fsencode(root) + b"/" + name)).touch()
    (root / "link.png").symlink_to(root / 'quote".png')
    (root / "sub").mkdir()
    (root / "sub" / "again").symlink_to(root)
    source = ImageFolder(root)
    with (tmp_path / "listing").open("wb") as listing:
        (shard,) = source.plan(100, listing)
    (chunk,) = source.chunks(shard, 100, tmp_path / "listing")
    assert sorted(chunk.ids) == sorted(["ä ☃.png", "line\nbreak.png", "bytes\\xff.png", 'quote".png', "link.png"])
    assert all(path.is_file() for path in chunk.images)
    (root / "nothing.png").symlink_to(root / "gone")
    with (tmp_path / "listing").open("wb") as listing, pytest.raises(FileNotFoundError, match="is a link to nothing"):
        source.plan(100, listing)


def test_names_that_are_not_utf8_are_escaped() -> None:
    assert printable(os.fsdecode(b"a\xff\xc3\xa4")) == "a\\xffä"
