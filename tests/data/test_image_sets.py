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
