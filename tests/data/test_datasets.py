"""Data sets by their names: what is known of them, and what is said of missing ones."""

from pathlib import Path

import pytest

from eefast.data import datasets


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
