"""What an error says about missing files: how to get those of each data set."""

import pytest

from eefast.data.datasets import DATASETS
from eefast.data.sources import how_to_get

# Those that torchvision cannot fetch.
BY_HAND = {
    "tiny-imagenet": "Stanford's CS231n course page",
    "imagenet": "ask image-net.org for ILSVRC2012",
    "folder": "put images into train/<class>/ and val/<class>/",
}


@pytest.mark.parametrize("name", dict.fromkeys([*DATASETS, *BY_HAND]))
def test_each_data_set_has_its_way(name: str) -> None:
    assert BY_HAND.get(name, "download=True (--download) fetches it there") in how_to_get(name)
