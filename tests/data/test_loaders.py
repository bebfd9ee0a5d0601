"""Parts of a data set and batches of it: order, sizes, progress."""

import pytest
import torch
from torch.utils.data import Dataset, random_split

from eefast.data import image_sets, loaders
from eefast.data.image_files import ImageFileError
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


class Unreadable(Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> object:
        raise self.error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("first line\nthe disk is gone"), "the disk is gone"),
        (RuntimeError(""), "RuntimeError"),
        (ImageFileError("x.png cannot be read"), "x.png cannot be read"),
    ],
    ids=["two lines", "no text", "file"],
)
def test_images_that_cannot_be_read_are_an_error_of_one_line(error, line):
    with pytest.raises(RuntimeError, match=f"^images could not be read: {line}$") as raised:
        list(loaders.batches(Unreadable(error), 2))
    assert raised.value.__cause__ is error


def test_a_lack_of_memory_stays_what_it_is():
    with pytest.raises(MemoryError):
        list(loaders.batches(Unreadable(MemoryError()), 2))


def test_samples_become_batches_and_batches_stay():
    whole = torch.zeros(2, 1), torch.zeros(2)
    assert loaders.collate(whole) is whole
    images, labels = loaders.collate([(torch.zeros(1, 2, 2), 3), (torch.ones(1, 2, 2), 4)])
    assert images.shape == (2, 1, 2, 2)
    assert labels.tolist() == [3, 4]
