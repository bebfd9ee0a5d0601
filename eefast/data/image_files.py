"""Folders of image files → classes and paths, or an error that names the file or folder."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

log = logging.getLogger("eefast")

# torchvision's, and further names of the same formats.
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
)
# Image formats that are not read, among them raw photographs, which need processing first.
OTHER_SUFFIXES = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".exr", ".hdr", ".dcm", ".dng", ".nef", ".cr2", ".arw")
)
# Folders that operating systems and servers add to the user's.
SYSTEM_FOLDERS = frozenset(("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"))
SPLIT_NAMES = frozenset(
    f"{name}{end}"
    for name in ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")
    for end in ("", "_set", "-set", "set", "_data")
)


class ImageFileError(ValueError):
    """An image file cannot be read; one line that names the file and says what to do.

    Worker processes pass on an error as its class and its traceback's text, from which the line is extracted.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


def shown(path: object) -> str:
    """A path as one printable line: line breaks and other characters that cannot be printed are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def class_folders(root: Path) -> list[Path]:
    """The folders in `root`, each a class, sorted by name as torchvision's ImageFolder does; empty if there are none.

    Links count as what they lead to. Hidden folders (names that start with a dot) and those of the operating system
    are not classes. Raises `FileNotFoundError` for a folder without images and for a link to nothing: they would
    shift the labels of later classes.
    """
    folders, loose = [], []
    for entry in _entries(root):
        if entry.is_dir():
            folders.append(Path(entry.path))
        elif Path(entry.name).suffix.lower() in IMAGE_SUFFIXES:
            loose.append(entry.name)
    folders.sort()
    if folders and loose:
        _warn_once(f"{shown(root)} has {len(loose)} images outside all classes, ignored, such as {shown(min(loose))}")
    above = _identities_above(root)
    for folder in folders:
        if _identity(folder) in above:
            raise ValueError(f"{shown(folder)} is a link to a folder that contains it and cannot be a class; delete it")
        if next(image_paths(folder), None) is None:
            raise FileNotFoundError(
                f"{shown(folder)} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}), but would be a class; "
                "fill it, or delete it"
            )
    return folders


def image_paths(folder: Path) -> Iterator[Path]:
    """All image files in a folder and in the folders below it, in no order; linked files and folders are followed.

    Hidden files and folders are ignored, and so are files whose ending is not an image's. A link to a folder that
    contains it leads to nothing new and is not followed.
    Raises `FileNotFoundError` for links to nothing, `ImageFileError` for what looks like an image by its name, but is
    no file, and `OSError` for folders that may not be read.
    """
    left_out = []
    todo = [(folder, _identities_above(folder))]
    while todo:
        here, above = todo.pop()
        for entry in _entries(here):
            suffix = Path(entry.name).suffix.lower()
            if entry.is_dir():
                identity = _identity(entry.path)
                if identity not in above:
                    todo.append((Path(entry.path), above | {identity}))
            elif suffix in IMAGE_SUFFIXES:
                if not entry.is_file():
                    raise ImageFileError(f"{shown(entry.path)} is no regular file; take it out of the data folder")
                yield Path(entry.path)
            elif suffix in OTHER_SUFFIXES:
                left_out.append(entry.path)
    if left_out:
        _warn_once(
            f"{shown(folder)} has {len(left_out)} images in formats that are not read, which are ignored, such as "
            f"{shown(min(left_out))}; convert them to PNG or JPEG"
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, without hidden names and those of the operating system; no link leads to nothing."""
    with os.scandir(folder) as listing:
        found = [entry for entry in listing if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS]
    for entry in found:
        if entry.is_symlink() and not Path(entry.path).exists():
            raise FileNotFoundError(f"{shown(entry.path)} is a link to nothing; repair or delete it")
    return found


def _identity(path: str | Path) -> tuple[int, int]:
    found = Path(path).stat()
    return found.st_dev, found.st_ino


def _identities_above(folder: Path) -> frozenset[tuple[int, int]]:
    """Of a folder and of all folders that contain it, by the path given and by its path on disk."""
    absolute = folder.absolute()
    return frozenset(
        _identity(path) for named in (absolute, absolute.resolve()) for path in (named, *named.parents) if path.exists()
    )


@cache
def _warn_once(message: str) -> None:
    log.warning(message)


def refuse_splits(root: Path, folders: list[Path]) -> None:
    """`ValueError` if folders that are to be classes are parts of a data set under other names than train and val."""
    for folder in folders:
        inner = [entry.name for entry in _entries(folder) if entry.is_dir()]
        if folder.name.casefold() in SPLIT_NAMES and inner:
            raise ValueError(
                f"{shown(folder)} has folders such as {shown(min(inner))}: is it a part of the data set, not a class? "
                f"name its parts {shown(root / 'train')} and {shown(root / 'val')}"
            )


def difference(found: Sequence[str], expected: Sequence[str]) -> str:
    """How two lists of classes differ, as text for an error; "" if they do not."""
    few = sorted(set(found) ^ set(expected))
    if not few:
        return ""
    alike = {unicodedata.normalize("NFC", name).casefold() for name in found} == {
        unicodedata.normalize("NFC", name).casefold() for name in expected
    }
    names = ", ".join(ascii(name) if alike and not name.isascii() else shown(name) for name in few[:5])
    more = f" and {len(few) - 5} more" if len(few) > 5 else ""
    why = " (the same names but for capitals, or for how accents are encoded)" if alike else ""
    return f"{names}{more}{why}"
