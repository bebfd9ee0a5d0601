"""Parts of a data set and batches of it: order, sizes, progress."""

import pytest
import torch
from torch.utils.data import random_split

from eefast.data import image_sets, loaders
from eefast.data.image_sets import ImageTensors


def test_held_out_images_are_those_that_training_keeps_aside():
    kept = ImageTensors(torch.arange(31).view(31, 1, 1, 1).to(torch.uint8), torch.arange(31))
    rest, found = loaders.split(kept, 7, 3)
    expected = random_split(kept, [24, 7], generator=torch.Generator().manual_seed(3))[1]
    assert sorted([*rest.indices, *found.indices]) == list(range(31))
    loaded = list(loaders.batches(found, 3))
    assert [len(labels) for _, labels in loaded] == [3, 3, 1]
    labels = torch.cat([labels for _, labels in loaded])
    assert labels.tolist() == list(expected.indices)
    assert torch.cat([x for x, _ in loaded]).flatten().tolist() == labels.tolist()


@pytest.mark.parametrize("count", [-1, 0, 32])
def test_no_more_images_are_held_out_than_there_are(count):
    kept = ImageTensors(torch.zeros(31, 1, 1, 1, dtype=torch.uint8), torch.arange(31))
    with pytest.raises(ValueError, match=rf"held_out={count} must be in 1 … 31"):
        loaders.split(kept, count, 1)


@pytest.mark.parametrize(
    ("total", "count"), [(1, 1), (7, 1), (100, 20), (24_999, 4999), (25_000, 5000), (60_000, 5000)]
)
def test_a_fifth_is_held_out_by_default_and_at_most_5000(total, count):
    assert loaders.default_held_out(total) == count


def test_progress_counts_images():
    steps = []
    kept = ImageTensors(torch.zeros(7, 1, 2, 2, dtype=torch.uint8), torch.arange(7))
    seen = list(loaders.batches(kept, 3).reported("work", lambda *step: steps.append(step)))
    assert len(seen) == 3
    assert steps == [("work", 0, 7), ("work", 3, 7), ("work", 6, 7), ("work", 7, 7)]


@pytest.mark.parametrize("seed", [1, 7])
def test_fewer_held_out_images_are_some_of_the_same(seed: int) -> None:
    """What lets --held-out be smaller than it was in training."""
    images = image_sets.ImageTensors(torch.zeros(97, 1, 1, 1, dtype=torch.uint8), torch.arange(97))
    trained, kept = loaders.split(images, 40, seed)
    fewer = loaders.split(images, 11, seed)[1]
    assert set(fewer.indices) < set(kept.indices)
    assert not set(fewer.indices) & set(trained.indices)
