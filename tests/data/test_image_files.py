"""Folders of image files → classes and paths, as torchvision lists them, or an error that names the folder."""

import logging
import os
import re
from pathlib import Path

import pytest
from pictures import photograph
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from eefast.data import datasets
from eefast.data.image_files import IMAGE_SUFFIXES, ImageFileError


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    photograph(4, 5).save(path, "PNG")
    return path


def read(root: Path, split: str = "train") -> dict[str, str]:
    """Path below root → class, of all that is found."""
    found = datasets.dataset("folder", root, split)
    assert datasets.info("folder", root).num_classes == len(found.classes)
    return {os.path.relpath(path, root): found.classes[label] for path, label in found.samples}


def test_linked_files_and_folders_are_read_as_torchvision_reads_them(tmp_path: Path) -> None:
    root = tmp_path / "one"
    picture(root / "train" / "a" / "0.png")
    picture(root / "train" / "b" / "deep" / "deeper" / "1.JPG")
    store = picture(tmp_path / "store" / "of two" / "2.Jpeg").parent
    (root / "train" / "a" / "linked").symlink_to(store)
    (root / "train" / "c").symlink_to(store)
    (root / "train" / "b" / "3.png").symlink_to(store / "2.Jpeg")
    expected = {
        "train/a/0.png": "a", "train/a/linked/2.Jpeg": "a", "train/b/3.png": "b", "train/b/deep/deeper/1.JPG": "b",
        "train/c/2.Jpeg": "c",
    }  # fmt: skip
    assert read(root) == expected
    theirs = ImageFolder(str(root / "train"))
    assert {os.path.relpath(path, root): theirs.classes[label] for path, label in theirs.samples} == expected
    assert set(IMG_EXTENSIONS) < IMAGE_SUFFIXES
    # Links that lead round in circles add nothing.
    for name in ("a/self", "a/deep/up", "b/top"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
    (root / "train" / "a" / "self").symlink_to(root / "train" / "a")
    (root / "train" / "a" / "deep" / "up").symlink_to("..")
    (root / "train" / "b" / "top").symlink_to(root)
    (store / "home").symlink_to(root / "train" / "c")
    assert read(root) == expected
    (root / "train" / "d").symlink_to(root)
    with pytest.raises(ValueError, match=r"train/d is a link to a folder that contains it"):
        read(root)


def test_hidden_files_and_those_of_systems_are_no_images_and_no_classes(tmp_path: Path) -> None:
    for name in ("b", "c c", "猫"):
        picture(tmp_path / "train" / name / "é 1.png")
    expected = {f"train/{name}/é 1.png": name for name in ("b", "c c", "猫")}
    assert read(tmp_path) == expected
    for hidden in (
        ".ipynb_checkpoints/x.png", ".git/x.png", "__MACOSX/b/._1.png", "@eaDir/x.png", "lost+found/x", "b/._é 1.png",
        "b/.hidden/x.png", "b/@eaDir/x.png", "b/Thumbs.db", "b/notes.txt", "b/.DS_Store", ".DS_Store", "labels.csv",
    ):  # fmt: skip
        picture(tmp_path / "train" / hidden)
    (tmp_path / "train" / "b" / "folder.jpg").mkdir()
    assert read(tmp_path) == expected
    assert ImageFolder(str(tmp_path / "train"), allow_empty=True).classes != ["b", "c c", "猫"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_class_without_images_is_named(tmp_path: Path, split: str) -> None:
    folder = {"train": "train", "test": "val"}
    for part in folder.values():
        picture(tmp_path / part / "a" / "0.png")
        picture(tmp_path / part / "c" / "0.png")
        (tmp_path / part / "b").mkdir()
        (tmp_path / part / "b" / "notes.txt").touch()
    picture(tmp_path / "train" / "b" / "0.png")
    if split == "train":
        (tmp_path / "train" / "b" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder[split]}/b has no images .*; fill it, or delete it"):
        read(tmp_path, split)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a/1.png", lambda path: path.symlink_to("gone.png"), r"a/1\.png is a link to nothing; repair or delete it"),
        ("a/more", lambda path: path.symlink_to("gone"), r"a/more is a link to nothing"),
        ("a/2.png", lambda path: path.symlink_to("2.png"), r"a/2\.png is a link to nothing"),
        ("b", lambda path: path.symlink_to("gone"), r"train/b is a link to nothing"),
        ("a/3.png", os.mkfifo, r"a/3\.png is no regular file"),
    ],
    ids=["file", "folder", "itself", "class", "pipe"],
)
def test_what_looks_like_an_image_but_is_none_stops_the_listing(tmp_path: Path, name: str, make, message: str) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    path = tmp_path / "train" / name
    make(path)
    with pytest.raises((FileNotFoundError, ImageFileError), match=message):
        read(tmp_path)
    path.unlink()
    assert read(tmp_path) == {"train/a/0.png": "a"}


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    picture(tmp_path / "train" / "a" / "closed" / "1.png")
    scan = os.scandir

    def scandir(path: str | Path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="a/closed"):
        read(tmp_path)


def test_images_that_are_left_out_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "train" / "a" / "0.png")
    with caplog.at_level(logging.WARNING, "eefast"):
        read(tmp_path)
        assert caplog.messages == []
        picture(tmp_path / "train" / "x.png")
        picture(tmp_path / "train" / "y.png")
        picture(tmp_path / "train" / "a" / "1.HEIC")
        for _ in range(2):
            assert read(tmp_path) == {"train/a/0.png": "a"}
    assert len(caplog.messages) == 2
    assert re.search(r"train has 2 images outside all classes, ignored, such as x\.png", caplog.text)
    assert re.search(r"a has 1 images in formats that are not read, .*1\.HEIC; convert them", caplog.text)


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        ("abc", "abd", "differ in classes: c, d$"),
        ("ab", "abc", "differ in classes: c$"),
        ("abc", "ab", "differ in classes: c$"),
        (["Cat"], ["cat"], r"differ in classes: Cat, cat \(the same names but for capitals"),
        (["é"], ["e\u0301"], r"differ in classes: 'e\\u0301', '\\xe9' \(the same names but for .* accents"),
        ([f"n{i}" for i in range(9)], ["m"], "differ in classes: m, n0, n1, n2, n3 and 5 more$"),
    ],
)
def test_both_parts_have_the_same_classes(tmp_path: Path, train, val, message: str) -> None:
    for part, names in (("train", train), ("val", val)):
        for name in names:
            picture(tmp_path / part / name / "0.png")
    with pytest.raises(ValueError, match=message):
        read(tmp_path, "test")


@pytest.mark.parametrize("names", [("Training", "Testing"), ("valid", "train_set"), ("TEST", "TRAIN"), ("test", "dev")])
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, names: tuple[str, str]) -> None:
    for part in names:
        for name in "ab":
            picture(tmp_path / part / name / "0.png")
    with pytest.raises(
        ValueError, match=r"is it a part of the data set, not a class\? name its parts .*train and .*val"
    ):
        read(tmp_path)
    # A class may be called so.
    picture(tmp_path / "other" / "test" / "0.png")
    picture(tmp_path / "other" / "control" / "0.png")
    assert read(tmp_path / "other") == {"control/0.png": "control", "test/0.png": "test"}
