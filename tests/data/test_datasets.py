"""Data sets by their names: what is known of them, and what is said of missing ones."""

from pathlib import Path

import pytest

from eefast.data import datasets


@pytest.mark.parametrize("folder", [".", "absent"])
@pytest.mark.parametrize("name", datasets.DATASETS)
def test_missing_data_says_how_to_get_it(tmp_path: Path, name: str, folder: str) -> None:
    others = {"tiny-imagenet": "tiny-imagenet-200.zip", "imagenet": "image-net.org", "folder": "put images into train/"}
    way_out = others.get(name, "download=True")
    root = tmp_path / folder
    with pytest.raises(FileNotFoundError, match=way_out) as raised:
        datasets.dataset(name, root, "train")
    assert str(root) in str(raised.value) or name in ("svhn", "cifar10")


@pytest.mark.parametrize("name", ["tiny-imagenet", "imagenet", "folder"])
def test_what_cannot_be_downloaded_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"download=True is not possible for {name}: "):
        datasets.dataset(name, tmp_path, "train", download=True)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dataset='mnits' is unknown; choose one of mnist, fashion-mnist"):
        datasets.dataset("mnits", tmp_path, "train")
    with pytest.raises(ValueError, match="split='valid' is unknown; choose one of train, test"):
        datasets.dataset("mnist", tmp_path, "valid")
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
