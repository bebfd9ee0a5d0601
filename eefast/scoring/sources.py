"""The words INPUT → the images there: a folder of image files, parquet, tar or .npy files."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.image_files import IMAGE_SUFFIXES, image_paths
from .arrays import Arrays
from .chunks import Source
from .image_folder import ImageFolder
from .image_parquet import ImageParquet
from .image_tars import ImageTars

ENDINGS = {".parquet": "parquet", ".pq": "parquet", ".tar": "tar", ".npy": "array", ".idx": "array"}
WHAT = (
    "a folder of image files, or .parquet, .tar, .npy or idx files: one, a pattern (a/b-*.tar, a/b-{00..99}.tar), or a "
    "folder of them"
)


def open_source(
    source: str | Path, shape: Sequence[int], image_column: str | None = None, id_column: str | None = None
) -> Source:
    """The images at `source`; shape: (C, H, W) of the images that the network takes, (C, L) of windows.

    image_column: of parquet files, by default "image"; of tar files the ending of the members that are images.
    Raises `ValueError` or `FileNotFoundError` where there are none, or of several kinds, or columns do not fit.
    """
    folder = Path(source)
    if folder.is_dir() and next(image_paths(folder), None) is not None:
        others = sorted(path for path in _below(folder) if path.is_file() and _kind(path) in ENDINGS.values())
        if others:
            raise ValueError(f"{source} has image files and files such as {others[0]}; name those of one kind")
        _no_columns("a folder of image files", image_column, id_column)
        return ImageFolder(folder)
    paths = _files(str(source))
    kinds = {_kind(path) for path in paths}
    if len(kinds) != 1:
        raise ValueError(f"{source} has files of several kinds ({', '.join(sorted(kinds))}); name those of one")
    kind = kinds.pop()
    if kind == "parquet":
        return ImageParquet(paths, image_column or "image", id_column, shape)
    if kind == "tar":
        _no_columns("tar files", None, id_column)
        return ImageTars(paths, image_column.lstrip(".").lower() if image_column else None)
    _no_columns(".npy files", image_column, id_column)
    return Arrays(paths, shape)


def decodes(source: Source) -> bool:
    """Whether images are files, which are decoded and prepared, and not pixels."""
    return not isinstance(source, Arrays)


def files_of(source: Source) -> list[Path]:
    """The parquet, tar or array files that are read."""
    if isinstance(source, Arrays):
        return [table.path for table in source.tables]
    return source.paths if isinstance(source, ImageParquet | ImageTars) else []


def folder_of(source: str | Path) -> Path | None:
    """The folder that is read, where INPUT is one."""
    return Path(source) if Path(source).is_dir() else None


def _files(source: str) -> list[Path]:
    folder = Path(source)
    if folder.is_dir():
        found = sorted(path for path in _below(folder) if path.is_file() and _kind(path) in ENDINGS.values())
        if not found:
            raise FileNotFoundError(
                f"{source} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}) and no {' '.join(ENDINGS)} files; give "
                f"{WHAT}"
            )
        return found
    paths = [Path(name) for pattern in _braces(source) for name in _matching(pattern)]
    if not paths:
        raise FileNotFoundError(f"{source} does not exist; give {WHAT}")
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, or is a folder; give {WHAT}")
        if _kind(path) not in ENDINGS.values():
            raise ValueError(f"{path} is of no kind that is read; give {WHAT}; eefast predict takes single image files")
    return paths


def _below(folder: Path) -> Iterator[Path]:
    """All in a folder but hidden names; links are followed."""
    yield from map(Path, glob.iglob(f"{glob.escape(str(folder))}/**/*", recursive=True))  # noqa: PTH207


def _matching(pattern: str) -> list[str]:
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [pattern]
    return sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (patterns may be absolute)


def _braces(pattern: str) -> Iterator[str]:
    """a{08..11}b → a08b, a09b, a10b, a11b, as webdataset writes them."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        yield pattern
        return
    first, last = found.groups()
    for number in range(int(first), int(last) + 1):
        yield from _braces(f"{pattern[: found.start()]}{number:0{len(first)}}{pattern[found.end() :]}")


def _kind(path: Path) -> str:
    """A value of `ENDINGS`, empty for files that are not read; idx files are called …-idx3-ubyte."""
    if re.search(r"idx\d-ubyte$", path.name):
        return "array"
    return ENDINGS.get(path.suffix.lower(), "")


def _no_columns(what: str, image_column: str | None, id_column: str | None) -> None:
    for option, value in (("--image-column", image_column), ("--id-column", id_column)):
        if value is not None:
            raise ValueError(f"{option} {value}: {what} have no columns; leave it out")
