"""INPUT in all its spellings → the files that are read, or what is wrong with it."""

from pathlib import Path

import numpy as np
import pytest

from eefast.scoring.arrays import Arrays
from eefast.scoring.image_folder import ImageFolder
from eefast.scoring.sources import decodes, folder_of, open_source

SHAPE = (3, 5, 4)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("b-08", "b-09", "b-10", "c"):
        np.save(tmp_path / f"{name}.npy", np.zeros((2, *SHAPE), np.uint8))
    return tmp_path


@pytest.fixture
def deep(place: Path) -> Path:
    (place / "x" / "y").mkdir(parents=True)
    (place / "c.npy").rename(place / "x" / "y" / "b-11.npy")
    return place


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("c.npy", ["c"]),
        ("b-*.npy", ["b-08", "b-09", "b-10"]),
        ("b-{08..10}.npy", ["b-08", "b-09", "b-10"]),
        ("b-{8..8}*.npy", None),
        (".", ["b-08", "b-09", "b-10", "c"]),
    ],
)
def test_files_patterns_and_folders(place: Path, words: str, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(FileNotFoundError, match=r"b-{8\.\.8}\*\.npy does not exist; give a folder of image files"):
            open_source(f"{place}/{words}", SHAPE)
        return
    found = open_source(f"{place}/{words}", SHAPE)
    assert isinstance(found, Arrays)
    assert [table.path.stem for table in found.tables] == names
    assert not decodes(found)
    assert folder_of(f"{place}/{words}") == (place if words == "." else None)


def test_a_folder_of_images_may_hold_other_files(place: Path, pictures: Path) -> None:
    assert isinstance(open_source(pictures, SHAPE), ImageFolder)
    with pytest.raises(ValueError, match="--image-column jpg: a folder of image files have no columns; leave it out"):
        open_source(pictures, SHAPE, "jpg")


def test_a_pattern_of_any_depth(deep: Path) -> None:
    found = open_source(f"{deep}/**/b-*.npy", SHAPE)
    assert isinstance(found, Arrays)
    assert [table.path.stem for table in found.tables] == ["b-08", "b-09", "b-10", "b-11"]


def test_images_beside_arrays_are_refused(place: Path) -> None:
    (place / "preview.png").touch()
    with pytest.raises(ValueError, match=r"has image files and files such as .*b-08\.npy; name those of one kind"):
        open_source(place, SHAPE)


def test_linked_folders_are_read(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "here").symlink_to(place)
    np.save(other / "x.npy", np.zeros((2, *SHAPE), np.uint8))
    found = open_source(other, SHAPE)
    assert isinstance(found, Arrays)
    assert [table.path.stem for table in found.tables] == ["b-08", "b-09", "b-10", "c", "x"]


def test_wrong_words(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has no images \(\.bmp .*\) and no \.parquet \.pq \.tar"):
        open_source(tmp_path / "empty", SHAPE)
    (tmp_path / "x.zip").touch()
    with pytest.raises(ValueError, match=r"x\.zip is of no kind that is read; .* eefast predict takes single"):
        open_source(tmp_path / "x.zip", SHAPE)
    (tmp_path / "x.tar").touch()
    with pytest.raises(ValueError, match=r"has files of several kinds \(array, tar\)"):
        open_source(tmp_path, SHAPE)
    with pytest.raises(FileNotFoundError, match=r"b-11\.npy does not exist"):
        open_source(f"{place}/b-{{08..11}}.npy", SHAPE)
