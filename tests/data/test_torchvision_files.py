"""Files in the layouts of SVHN and CIFAR-10, generated."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from eefast.data import datasets


def published_md5(monkeypatch: pytest.MonkeyPatch, owner: type, attribute: str, entries: object) -> None:
    """Pass generated files off as the published ones, which torchvision knows by their MD5."""
    monkeypatch.setattr(owner, attribute, entries)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, 3, 3072), dtype=np.uint8)
    for name, values, labels in (("data_batch_1", pixels[0], [3, 9, 0]), ("test_batch", pixels[1], [1, 1, 2])):
        (folder / name).write_bytes(pickle.dumps({"data": values, "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))
    (folder / "data_batch_3").touch()
    with pytest.raises(
        FileNotFoundError, match=r"data_batch_1 is damaged, .*_2 is missing, .*_3 is damaged.*; download=True"
    ):
        datasets.dataset("cifar10", tmp_path, "train")
    published_md5(monkeypatch, CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    published_md5(monkeypatch, CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    published_md5(monkeypatch, CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(folder / "batches.meta")})
    for split, values, labels in (("train", pixels[0], [3, 9, 0]), ("test", pixels[1], [1, 1, 2])):
        found = datasets.dataset("cifar10", tmp_path, split)
        assert [int(label) for _, label in found] == labels
        assert np.array_equal(found[1][0].numpy(), values[1].reshape(3, 32, 32))


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
    path = tmp_path / "train_32x32.mat"
    savemat(path, {"X": images, "y": np.array([[10], [1], [9], [10], [2]], dtype=np.uint8)})
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat is damaged; download=True"):
        datasets.dataset("svhn", tmp_path, "train")
    published_md5(monkeypatch, SVHN, "split_list", {"train": ["", path.name, md5(path)]})
    found = datasets.dataset("svhn", tmp_path, "train")
    assert [int(label) for _, label in found] == [0, 1, 9, 0, 2]
    assert np.array_equal(found[3][0].numpy(), images[:, :, :, 3].transpose(2, 0, 1))
