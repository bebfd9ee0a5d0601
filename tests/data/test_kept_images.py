"""Small images kept in memory beside the same files, decoded each time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eefast.data import datasets, image_sets, kept_images, loaders, photographs


@pytest.fixture
def root(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 7), ("test", 3)):
        for name in ("b", "a", "c"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    return tmp_path


def pixels_of(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", datasets.SPLITS)
def test_batches_are_those_of_the_files(root: Path, split: str, workers: int) -> None:
    found = datasets.dataset("folder", root, split, image_size=24)
    assert isinstance(found, kept_images.KeptImages)
    paths = sorted((root / split).rglob("*.png"))
    for _ in range(2):  # decoded, then from memory
        images, labels = (torch.cat(part) for part in zip(*loaders.batches(found, 5, workers), strict=True))
        assert torch.equal(images, torch.stack([pixels_of(path) for path in paths]))
        assert labels.tolist() == ["abc".index(path.parent.name) for path in paths]


def test_every_image_is_decoded_once(root: Path) -> None:
    found = datasets.dataset("folder", root, "train", image_size=24)
    first = found.__getitems__([4, 20, 4])
    for path, _ in found.samples:
        path.write_bytes(b"")
    assert torch.equal(found.__getitems__([4, 20, 4])[0], first[0])
    assert torch.equal(found[20][0], first[0][1])
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image \(it is empty\)"):
        found.__getitems__([4, 0])


def test_training_shifts_them_and_crops_nothing(root: Path) -> None:
    found = datasets.dataset("folder", root, "train", image_size=24)
    assert found.shift == 3
    assert torch.equal(found.for_training()[5][0], pixels_of(found.samples[5][0]))


def test_fingerprint_and_classes_are_those_of_the_files(root: Path) -> None:
    found = datasets.dataset("folder", root, "train", image_size=24)
    plain = image_sets.ImageFiles(found.samples, torch.Tensor)
    assert image_sets.fingerprint(found) == image_sets.fingerprint(plain)
    assert (image_sets.class_names(found), image_sets.resize_of(found)) == (("a", "b", "c"), 24)


@pytest.mark.parametrize(
    ("constant", "value", "shift"),
    [(kept_images, ("MOST_BYTES", 21 * 3 * 24 * 24 - 1), 3), (photographs, ("SMALL", 23), 0)],
)
def test_more_and_larger_images_are_decoded_each_time(
    root: Path, monkeypatch: pytest.MonkeyPatch, constant: object, value: tuple[str, int], shift: int
) -> None:
    monkeypatch.setattr(constant, *value)
    found = datasets.dataset("folder", root, "train", image_size=24)
    assert type(found) is image_sets.ImageFiles
    assert found.shift == found.for_training().shift == shift
    torch.manual_seed(0)
    changed = any(not torch.equal(found.for_training()[i][0], pixels_of(found.samples[i][0])) for i in range(3))
    assert changed == (shift == 0)
