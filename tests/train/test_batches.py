"""Batches: each sample with its index, in an order and with random numbers that follow from seed and epoch alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tagged_images import numbered_images
from torch.utils.data import Subset

from eefast.data.image_sets import ImageFiles
from eefast.train.batches import EpochOrder, EpochSeeds, Indexed, epoch_seed, training_batches


@pytest.mark.parametrize("order", [range(31), range(30, -1, -1)], ids=["all", "a subset"])
def test_the_index_comes_with_the_sample(order: range) -> None:
    images = numbered_images(31)
    loader = training_batches(images if order == range(31) else Subset(images, order), 7, 1, 0)
    for pictures, labels, index in loader:
        number = torch.tensor(order)[index]
        assert torch.equal(pictures[:, 0, 0, 0].long(), number)
        assert torch.equal(labels, number % 3)
    # The last three images make no batch.
    assert len(loader) == 4


def test_the_index_comes_with_the_file(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    files = ImageFiles([(tmp_path / "x.png", i % 3) for i in range(31)], lambda image: torch.zeros(1))
    assert Indexed(files)[5][1:] == (2, 5)
    seen = [batch[1:] for batch in training_batches(files, 7, 1, 0)]
    assert all(torch.equal(labels, index % 3) for labels, index in seen)
    assert len(seen) == 4


def test_the_order_follows_from_seed_and_epoch() -> None:
    orders = {}
    for seed in (1, 2):
        sampler = EpochOrder(257, seed)
        for epoch in (0, 1):
            sampler.epoch = epoch
            orders[seed, epoch] = list(sampler)
            assert sorted(orders[seed, epoch]) == list(range(257))
            assert list(sampler) == orders[seed, epoch]
    assert len(set(map(tuple, orders.values()))) == 4


def test_every_epoch_has_its_random_numbers() -> None:
    """However many were drawn before it, and in a run that goes on after a checkpoint too."""

    def drawn(start_of_epoch) -> tuple[list, list, list]:
        loader = training_batches(numbered_images(31), 7, 5, 0)
        seeds = EpochSeeds(5, loader)
        torch.manual_seed(99)
        start_of_epoch(seeds)
        workers = torch.rand(2, generator=loader.generator).tolist()
        return [index.tolist() for *_, index in loader], workers, torch.rand(2).tolist()

    def resumed(seeds: EpochSeeds) -> None:
        seeds.on_load_checkpoint(None, None, {"epoch": 2})
        # The iterator with its workers is made before the epoch starts.
        assert seeds.batches.sampler.epoch == 3
        seeds.on_train_epoch_start(SimpleNamespace(current_epoch=3), None)

    def at(epoch: int):
        return lambda seeds: seeds.on_train_epoch_start(SimpleNamespace(current_epoch=epoch), None)

    third = drawn(at(3))
    assert drawn(resumed) == third
    for other, same in zip(drawn(at(2)), third, strict=True):
        assert other != same


def test_seeds_of_epochs_differ() -> None:
    assert len({epoch_seed(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 999)}) == 9
