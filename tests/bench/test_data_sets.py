"""Names of data sets in rows: where they are, how they are read, how a trained network's record is named."""

from dataclasses import replace
from pathlib import Path

import data_sets
import pytest
from idx_files import write_mnist
from PIL import Image

from eefast.data import datasets
from eefast.record import TrainingRecord


def test_small_photographs_are_read_from_their_folder(tmp_path: Path) -> None:
    for split, level in (("train", 200), ("test", 40)):
        for name in ("cat", "ant"):
            folder = tmp_path / "cifar10-jpeg" / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (32, 32), (level, 7, 9)).save(folder / "0.png")
    for split, level in (("train", 200), ("test", 40)):
        found = data_sets.open_images(data_sets.CIFAR10_JPEG, tmp_path, split)
        assert found.classes == ("ant", "cat")
        assert found[1][0][:, 5, 31].tolist() == [level, 7, 9]
        assert (found[1][1], found.shift) == (1, 4)


def test_others_are_read_by_their_name(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 31)
    assert data_sets.root_of("mnist", tmp_path) == tmp_path
    assert data_sets.options_of("mnist") == {"dataset": "mnist"}
    found = data_sets.open_images("mnist", tmp_path, "train")
    assert found[3][0].equal(datasets.dataset("mnist", tmp_path, "train")[3][0])


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"cifar10-jpeg has no train/ and test/ .*; unpack images\.tar\.xz"):
        data_sets.root_of(data_sets.CIFAR10_JPEG, tmp_path)


def test_a_record_is_named_by_its_images() -> None:
    record = TrainingRecord("eenet32", 10, (3, 32, 32), "folder", None, 32, 50000, "0" * 16, 5000, 1)
    assert data_sets.name_of(record) == "folder"
    assert data_sets.name_of(replace(record, fingerprint=data_sets.CIFAR10_FINGERPRINT)) == "CIFAR-10 (JPEG copy)"
