"""Data sets from files: the idx reader, published folder layouts, errors, and the shipped MNIST test images."""

import gzip
import hashlib
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from idx_files import idx_bytes
from torch.utils.data import DataLoader

from eefast.data import datasets, image_sets, mnist
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
    with pytest.raises(ValueError, match="not a whole gzip file"):
        mnist.read_idx(path)


def write_mnist(folder: Path, stem: str, count: int, suffix: str = "") -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    pack = gzip.compress if suffix else bytes
    (folder / f"{stem}-images-idx3-ubyte{suffix}").write_bytes(pack(idx_bytes(images)))
    (folder / f"{stem}-labels-idx1-ubyte{suffix}").write_bytes(pack(idx_bytes(labels)))
    return images, labels


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


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_missing_data_says_how_to_get_it(tmp_path: Path, name: str) -> None:
    others = {"tiny-imagenet": "tiny-imagenet-200.zip", "imagenet": "image-net.org", "folder": "put images into train/"}
    way_out = others.get(name, "download=True")
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=way_out) as raised:
            datasets.dataset(name, root, "train")
        assert str(root) in str(raised.value) or name in ("svhn", "cifar10")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset='mnits' is unknown; choose one of mnist, fashion-mnist"):
        datasets.dataset("mnits", tmp_path, "train")
    with pytest.raises(ValueError, match="split='valid' is unknown; choose one of train, test"):
        datasets.dataset("mnist", tmp_path, "valid")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    for name in ("tiny-imagenet", "imagenet", "folder"):
        with pytest.raises(ValueError, match="download=True is not possible"):
            datasets.dataset(name, tmp_path, "train", download=True)
    with pytest.raises(ValueError, match="dataset='folder' needs root"):
        datasets.info("folder")
    with pytest.raises(ValueError, match="image_size=0 must be at least 1"):
        datasets.info("imagenet", image_size=0)
    with pytest.raises(ValueError, match="image_size=64: the images of cifar10 have one size"):
        datasets.dataset("cifar10", tmp_path, "train", image_size=64)


def test_files_of_another_data_set_are_refused(tmp_path: Path) -> None:
    """MNIST's and Fashion-MNIST's files have the same names."""
    assert len(set(mnist.PUBLISHED_LABELS)) == 4
    for kind in ("images-idx3", "labels-idx1"):
        name = f"t10k-{kind}-ubyte.gz"
        (tmp_path / name).write_bytes((resources.files("eefast") / "assets" / "mnist" / name).read_bytes())
    assert len(datasets.dataset("mnist", tmp_path, "test")) == 10_000
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte\.gz has the labels of mnist, not of fashion-mnist"):
        datasets.dataset("fashion-mnist", tmp_path, "test")


def test_fingerprint_follows_labels_names_and_their_order(tmp_path: Path) -> None:
    write_mnist(tmp_path, "train", 31)
    tensors = datasets.dataset("mnist", tmp_path, "train")
    files = [(Path("a") / f"{i}.png", 0) for i in range(3)] + [(Path("b") / "0.png", 1)]
    changed = [
        image_sets.fingerprint(images)
        for images in (
            tensors,
            image_sets.ImageTensors(*tensors[:30]),
            image_sets.ImageTensors(tensors.images, tensors.labels.flip(0)),
            image_sets.ImageFiles(files, torch.Tensor),
            image_sets.ImageFiles(files[1:], torch.Tensor),
            image_sets.ImageFiles(files[::-1], torch.Tensor),
            image_sets.ImageFiles([*files[:3], (Path("c") / "0.png", 1)], torch.Tensor),
        )
    ]
    assert len(set(changed)) == len(changed)
    moved = image_sets.ImageFiles([(tmp_path / path, label) for path, label in files], torch.Tensor)
    assert image_sets.fingerprint(moved) == changed[3]
    with pytest.raises(TypeError, match="images is a Subset"):
        image_sets.fingerprint(torch.utils.data.Subset(tensors, [0]))


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


def write_image(path: Path, size: tuple[int, int], level: int) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if level % 2 else "RGB", size, level if level % 2 else (level, 0, 255 - level)).save(path, "JPEG")


def of_classes(count: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pass a few folders off as the hundreds that were published."""
    monkeypatch.setitem(datasets.DATASETS, name, replace(datasets.DATASETS[name], num_classes=count))


@pytest.mark.parametrize("nested", [True, False])
def test_tiny_imagenet(tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "tiny-imagenet-200" if nested else tmp_path
    (folder / "train" / ".ipynb_checkpoints").mkdir(parents=True)
    for name, level in (("n02", 40), ("n01", 81)):
        for i in range(3):
            write_image(folder / "train" / name / "images" / f"{name}_{i}.JPEG", (64, 64), level)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t63\t63\n")
    for i, level in enumerate((40, 81, 120)):
        write_image(folder / "val" / "images" / f"val_{i}.JPEG", (64, 64), level)
    with pytest.raises(ValueError, match=r"train has 2 classes, tiny-imagenet has 200; .*dataset='folder'"):
        datasets.dataset("tiny-imagenet", tmp_path, "train")
    of_classes(2, "tiny-imagenet", monkeypatch)
    annotations = folder / "val" / "val_annotations.txt"
    with pytest.raises(FileNotFoundError, match=r"val_annotations\.txt is missing"):
        datasets.dataset("tiny-imagenet", tmp_path, "test")
    annotations.write_text("val_2.JPEG\tn02\t0\t0\t9\t9\nval_0.JPEG\tn01\t0\t0\t9\t9\nval_1.JPEG\tn02\t0\t0\t9\t9\n")
    train, test = (datasets.dataset("tiny-imagenet", tmp_path, split) for split in datasets.SPLITS)
    assert [int(label) for _, label in train.samples] == [0, 0, 0, 1, 1, 1]
    assert train.classes == test.classes == ("n01", "n02")
    assert [int(label) for _, label in test] == [1, 0, 1]
    image, _ = test[0]
    assert image.shape == datasets.info("tiny-imagenet").shape
    assert image.dtype == torch.uint8
    # JPEG may move a level by a few.
    assert torch.allclose(image.float().mean((1, 2)), torch.tensor([120.0, 0.0, 135.0]), atol=4)
    annotations.write_text("val_0.JPEG\tn99\t0\t0\t9\t9\n")
    with pytest.raises(ValueError, match="names classes that train/ does not have: n99"):
        datasets.dataset("tiny-imagenet", tmp_path, "test")
    annotations.write_text("val_0.JPEG\tn01\t0\nval_9.JPEG\tn01\t0\n")
    with pytest.raises(FileNotFoundError, match=r"names 1 images that .* does not have, such as val_9\.JPEG"):
        datasets.dataset("tiny-imagenet", tmp_path, "test")


def test_imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "val"):
        for name, level in (("n07", 200), ("n03", 33)):
            write_image(tmp_path / split / name / f"{name}_1.JPEG", (300, 260), level)
        with pytest.raises(ValueError, match=rf"{split} has 2 classes, imagenet has 1000; .*dataset='folder'"):
            datasets.dataset("imagenet", tmp_path, "train" if split == "train" else "test")
    of_classes(2, "imagenet", monkeypatch)
    for split in datasets.SPLITS:
        found = datasets.dataset("imagenet", tmp_path, split)
        assert [int(label) for _, label in found.samples] == [0, 1]
        assert found.classes == ("n03", "n07")
        image, _ = found[0]
        assert image.shape == datasets.info("imagenet").shape
        assert torch.allclose(image.float().mean((1, 2)), torch.full((3,), 33.0), atol=4)


@pytest.mark.parametrize("layout", ["train", "flat"])
def test_image_folder_equals_torchvisions(tmp_path: Path, layout: str) -> None:
    from torchvision.datasets import ImageFolder

    root = tmp_path / "train" if layout == "train" else tmp_path
    for name, level in (("b", 40), ("A", 200), ("c", 81)):
        for i in range(3):
            write_image(root / name / "more" / f"{i}.jpg", (40, 30), level)
    (root / "b" / "notes.txt").write_text("not an image")
    expected = ImageFolder(str(root)).samples
    found = datasets.dataset("folder", tmp_path, "train", image_size=31)
    assert [(str(path), label) for path, label in found.samples] == expected
    info = datasets.info("folder", tmp_path, 31)
    assert info.num_classes == 3
    assert info.shape == found[0][0].shape == (3, 31, 31)
    if layout == "flat":
        with pytest.raises(FileNotFoundError, match="val or test"):
            datasets.dataset("folder", tmp_path, "test")
        return
    for name, level in (("b", 40), ("A", 200), ("c", 81)):
        write_image(tmp_path / "test" / name / "x.jpg", (40, 30), level)
    assert [label for _, label in datasets.dataset("folder", tmp_path, "test").samples] == [0, 1, 2]
    # Without it, "c" would have the label of "b".
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "d")
    with pytest.raises(ValueError, match="differ in classes: b, d"):
        datasets.dataset("folder", tmp_path, "test")


def test_photographs_are_cropped_at_random_for_training_only(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "train" / "n01" / "ramp.png"
    path.parent.mkdir(parents=True)
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    Image.fromarray(np.stack([np.broadcast_to(ramp, (64, 64))] * 3, axis=-1)).save(path)
    plain = datasets.dataset("folder", tmp_path, "train", image_size=32)
    changed = plain.for_training()
    assert len(changed) == 1
    torch.manual_seed(0)
    assert torch.equal(plain[0][0], plain[0][0])
    crops = [changed[0][0] for _ in range(9)]
    assert all(crop.shape == (3, 32, 32) and crop.dtype == torch.uint8 for crop in crops)
    assert len({crop.numpy().tobytes() for crop in crops}) == 9
    # Not mirrored here: left stays darker than right.
    assert all(crop[0, 0, 0] < crop[0, 0, -1] for crop in crops)


def test_augmentation_as_in_the_papers() -> None:
    found = {name: (info.shift, info.flip) for name, info in datasets.DATASETS.items()}
    assert found == {
        "mnist": (0, False),
        "fashion-mnist": (0, False),
        "svhn": (0, False),
        "cifar10": (4, True),
        "tiny-imagenet": (0, True),
        "imagenet": (0, True),
        "folder": (0, True),
    }


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
