"""idx files of MNIST and Fashion-MNIST, and the images that ship with the package."""

import gzip
import hashlib
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from idx_files import idx_bytes, write_mnist
from torch.utils.data import DataLoader

from eefast.data import datasets, mnist
from eefast.data.loaders import collate


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=1, max_size=5), packed=st.booleans(), seed=st.integers(0, 2**31))
def test_idx_round_trip(tmp_path_factory: pytest.TempPathFactory, shape: list[int], packed: bool, seed: int) -> None:
    array = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path_factory.mktemp("idx") / ("values.gz" if packed else "values")
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    read = mnist.read_idx(path)
    assert read.dtype == torch.uint8
    assert read.shape == torch.Size(shape)
    assert np.array_equal(read.numpy(), array)


WHOLE = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it starts with nothing"),
        (b"\0\0\x08", "not an idx file"),
        (b"\x1f\x8b" + WHOLE, "not an idx file: it starts with 1f 8b 00 00"),
        (b"\0\0\x0d" + WHOLE[3:], "idx type 0x0d"),
        (b"\0\0\x08\0", "header of 0 dimensions"),
        (b"\0\0\x08\x03" + WHOLE[4:12], "header of 3 dimensions"),
        (WHOLE[:-1], "has 11 values, its header promises 12"),
        (WHOLE + b"\0", "has 13 values, its header promises 12"),
        (b"\0\0\x08\x02" + b"\xff" * 8, "promises 18446744065119617025"),
    ],
)
def test_idx_malformed(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "values"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        mnist.read_idx(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"plain" + b, lambda b: b[:-9] + b"\x55" * 9])
def test_idx_damaged_gzip(tmp_path: Path, damage) -> None:
    path = tmp_path / "values.gz"
    path.write_bytes(damage(gzip.compress(WHOLE)))
    with pytest.raises(ValueError, match="not a complete gzip file"):
        mnist.read_idx(path)


@pytest.mark.parametrize(
    ("name", "layout", "suffix"),
    [
        ("mnist", ".", ".gz"),
        ("mnist", "mnist", ""),
        ("mnist", "MNIST/raw", ".gz"),
        ("fashion-mnist", "fashion-mnist", ".gz"),
        ("fashion-mnist", "FashionMNIST/raw", ""),
    ],
)
def test_mnist_layouts(tmp_path: Path, name: str, layout: str, suffix: str) -> None:
    expected = {
        "train": write_mnist(tmp_path / layout, "train", 31, suffix),
        "test": write_mnist(tmp_path / layout, "t10k", 3, suffix),
    }
    for split, (images, labels) in expected.items():
        found = datasets.dataset(name, tmp_path, split)
        assert len(found) == len(labels)
        image, label = found[2]
        assert image.shape == datasets.info(name).shape
        assert image.dtype == torch.uint8
        assert np.array_equal(image[0].numpy(), images[2])
        assert int(label) == labels[2]


def test_batches_keep_images_and_labels_together(tmp_path: Path) -> None:
    images, labels = write_mnist(tmp_path, "train", 31)
    found = datasets.dataset("mnist", tmp_path, "train")
    batches = list(DataLoader(found, batch_size=7, shuffle=True, collate_fn=collate))
    assert [len(y) for _, y in batches] == [7, 7, 7, 7, 3]
    seen = {x.numpy().tobytes(): int(y) for xs, ys in batches for x, y in zip(xs, ys, strict=True)}
    assert seen == {images[i].tobytes(): int(labels[i]) for i in range(31)}


def test_images_that_do_not_belong_to_the_labels(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 5)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(4)))
    with pytest.raises(ValueError, match="5 images and 4 labels"):
        datasets.dataset("mnist", tmp_path, "train")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(5, 10)))
    with pytest.raises(ValueError, match="labels 0 … 9"):
        datasets.dataset("mnist", tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(np.zeros((5, 27, 28))))
    with pytest.raises(ValueError, match=re.escape("(5, 27, 28); expected [N, 28, 28]")):
        datasets.dataset("mnist", tmp_path, "train")


def test_files_of_another_data_set_are_refused(tmp_path: Path) -> None:
    """MNIST's and Fashion-MNIST's files have the same names."""
    assert len(set(mnist.PUBLISHED_LABELS)) == 4
    for kind in ("images-idx3", "labels-idx1"):
        name = f"t10k-{kind}-ubyte.gz"
        (tmp_path / name).write_bytes((resources.files("eefast") / "assets" / "mnist" / name).read_bytes())
    assert len(datasets.dataset("mnist", tmp_path, "test")) == 10_000
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz has the labels of mnist, not of fashion-mnist"):
        datasets.dataset("fashion-mnist", tmp_path, "test")


def test_shipped_mnist() -> None:
    images, labels = mnist.mnist_test()
    assert images.shape == (10000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]
    folder = resources.files("eefast") / "assets" / "mnist"
    for kind in ("images-idx3", "labels-idx1"):
        unpacked = gzip.decompress((folder / f"t10k-{kind}-ubyte.gz").read_bytes())
        assert hashlib.md5(unpacked).hexdigest() in (folder / "README.md").read_text()


def test_shipped_mnist_needs_torch_only() -> None:
    code = (
        "import sys; from eefast.data.mnist import mnist_test; assert len(mnist_test()[1]) == 10000; "
        "print([m for m in ('lightning', 'torchvision', 'PIL', 'matplotlib', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
