"""Folders of classes: layouts, labels, the centre that is cut out; against torchvision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from eefast.data import datasets


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 9000), (9000, 1), (3, 2)], ids=str)
def test_all_shapes_of_images(tmp_path: Path, size: tuple[int, int], training: bool) -> None:
    path = tmp_path / "train" / "a" / "x.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", size, (9, 80, 200)).save(path)
    plain = datasets.dataset("folder", tmp_path, "train", image_size=224)
    images = plain.for_training() if training else plain
    assert torch.equal(images[0][0].float().mean((1, 2)), torch.tensor([9.0, 80.0, 200.0]))
    assert images[0][0].shape == (3, 224, 224)


@pytest.mark.parametrize(("size", "resize"), [((32, 32), 32), ((33, 32), 37)], ids=["of this size", "one wider"])
def test_images_that_have_the_size_are_not_cropped(tmp_path: Path, size: tuple[int, int], resize: int) -> None:
    root = tmp_path / "train" / "a"
    root.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(3):
        pixels = random.integers(0, 256, (32, size[0] if i == 1 else 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    found = datasets.dataset("folder", tmp_path, "train", image_size=32)
    assert found.resize == found.for_training().resize == resize
    with Image.open(root / "2.png") as image:
        whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(found[2][0], whole) == (resize == 32)
    assert torch.equal(datasets.dataset("folder", tmp_path, "train", image_size=32, resize=32)[2][0], whole)
    assert datasets.dataset("folder", tmp_path, "train", image_size=32, resize=41).resize == 41
