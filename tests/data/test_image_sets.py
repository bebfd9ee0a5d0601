"""Data sets in memory and in files: what their fingerprint follows."""

from pathlib import Path

import pytest
import torch
from idx_files import write_mnist

from eefast.data import datasets, image_sets


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


def test_images_and_labels_belong_together() -> None:
    with pytest.raises(ValueError, match="3 images and 2 labels: the files do not belong together"):
        image_sets.ImageTensors(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))


def test_batches_in_memory_are_fetched_at_once() -> None:
    images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    kept = image_sets.ImageTensors(images, torch.arange(7))
    found, labels = kept.__getitems__([5, 0, 5])
    assert found.flatten().tolist() == labels.tolist() == [5, 0, 5]
    assert len(kept) == 7


def test_only_files_have_names_of_classes_and_changes_in_training() -> None:
    made = image_sets.ImageFiles([(Path("a") / "0.png", 0)], abs, max, ["a", "b"])
    assert image_sets.class_names(made) == ("a", "b")
    assert image_sets.class_names(image_sets.ImageTensors(torch.zeros(0), torch.zeros(0))) is None
    assert made.transform is abs
    assert (made.for_training().transform, made.for_training().classes) == (max, ("a", "b"))
    assert image_sets.ImageFiles([], abs).for_training().transform is abs
