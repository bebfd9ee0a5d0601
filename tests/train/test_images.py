"""Images of a run: the seed draws those held out, few of them are reported, photographs are cropped at random."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from eefast.data import loaders
from eefast.data.image_sets import ImageFiles
from eefast.train.images import open_images
from eefast.train.options import TrainOptions


def opened(root: Path, **options: object):
    return open_images(TrainOptions(data_root=root, **options))


def test_the_seed_draws_the_images_that_are_held_out(small_mnist: Path) -> None:
    found = opened(small_mnist, held_out=200, seed=7)
    rest, kept = loaders.split(found.whole, 200, 7)
    assert (found.unchanged.indices, found.held_out.indices) == (rest.indices, kept.indices)
    assert len(found.whole) == 900
    assert found.info.shape == (1, 28, 28)
    assert opened(small_mnist, held_out=200, seed=8).held_out.indices != kept.indices


@pytest.mark.parametrize("asked", [True, False])
def test_test_images_are_opened_where_they_are_asked_for(small_mnist: Path, asked: bool) -> None:
    test = opened(small_mnist, test=asked).test
    assert (test and len(test)) == (300 if asked else None)


@pytest.mark.parametrize(
    ("options", "lines"),
    [
        ({}, ["180 of 900 training images, a fifth, are held out", "held_out=180 images are few .* 0.0056 .* 200 or"]),
        ({"held_out": 180}, ["held_out=180 images are few .* 0.0056 .* hold out 200 or more"]),
        ({"held_out": 180, "max_accuracy_drop": 0.01}, []),
        ({"held_out": 180, "max_cost": 0.5}, []),
        ({"held_out": 99, "max_cost": 0.5}, ["held_out=99 images are few .* hold out 100 or more"]),
        ({"held_out": 200}, []),
    ],
    ids=str,
)
def test_few_held_out_images_are_reported(small_mnist: Path, capsys, options: dict, lines: list[str]) -> None:
    opened(small_mnist, **options)
    out, err = capsys.readouterr()
    assert out == ""
    said = err.splitlines()
    assert len(said) == len(lines)
    assert all(re.match(line, text) for line, text in zip(lines, said, strict=True))


@pytest.mark.parametrize(("held_out", "batch_size", "fits"), [(772, 128, True), (773, 128, False), (899, 2, False)])
def test_a_batch_to_train_on_must_be_left(small_mnist: Path, held_out: int, batch_size: int, fits: bool) -> None:
    options = {"held_out": held_out, "batch_size": batch_size}
    if fits:
        assert len(opened(small_mnist, **options).unchanged) == batch_size
        return
    with pytest.raises(ValueError, match=f"held_out={held_out} of 900 training images leaves no batch of batch_size="):
        opened(small_mnist, **options)


@pytest.mark.parametrize(("part", "cropped"), [("unchanged", False), ("held_out", False), ("augmented", True)])
def test_photographs_to_train_on_are_cropped_at_random_and_no_others(colours: Path, part: str, cropped: bool) -> None:
    found = opened(colours, dataset="folder", image_size=8, held_out=60, batch_size=16)
    assert isinstance(found.whole, ImageFiles)
    assert found.augmented.indices == found.unchanged.indices
    torch.manual_seed(0)
    first, again = (torch.stack([getattr(found, part)[i][0] for i in range(5)]) for _ in range(2))
    assert torch.equal(first, again) != cropped


def test_images_in_memory_are_changed_in_training_steps_only(small_mnist: Path) -> None:
    found = opened(small_mnist, held_out=200)
    assert found.augmented.dataset is found.whole


@pytest.mark.parametrize(("crop_fraction", "resize"), [(None, 18), (0.8, 20), (1.0, 16)])
def test_held_out_and_test_images_are_cropped_alike(colours: Path, crop_fraction: float | None, resize: int) -> None:
    found = opened(
        colours, dataset="folder", image_size=16, held_out=60, batch_size=16, test=True, crop_fraction=crop_fraction
    )
    assert found.whole.resize == found.test.resize == resize


@pytest.mark.parametrize(("size", "shift"), [(32, 4), (31, 0)], ids=["of this size", "resized"])
def test_small_images_of_the_wanted_size_are_shifted(tmp_path: Path, size: int, shift: int) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (size, size), (9 * i, 80, 200)).save(tmp_path / "train" / name / f"{i}.png")
    found = opened(tmp_path, dataset="folder", image_size=32, held_out=2, batch_size=4)
    assert (found.info.shift, found.info.flip) == (shift, True)
    assert (found.augmented.dataset is found.whole) == bool(shift)


def test_download_beside_published_weights_is_for_the_weights(colours: Path) -> None:
    """As in docs/quick-start.md; without them it cannot be meant otherwise than for the images."""
    options = {"dataset": "folder", "image_size": 8, "held_out": 9, "batch_size": 4, "download": True}
    with pytest.raises(ValueError, match="download=True is not possible for folder"):
        opened(colours, **options)
    backbone = {"backbone": "torchvision:resnet18", "exits": ("layer1",), "weights": "IMAGENET1K_V1"}
    assert len(opened(colours, **options, **backbone).held_out) == 9
