"""Exit tags against a loop; refreshing them leaves the network as it was."""

import pytest
import torch
from tagged_images import looped_tags, numbered_images, small_net, tags_one_by_one

from eefast import ExitOutput
from eefast.data.loaders import batches
from eefast.train.tags import exit_tags, random_tags, refreshed


def outputs_of(logits: torch.Tensor) -> list[ExitOutput]:
    return [ExitOutput(rows, torch.zeros(len(rows)), torch.zeros(len(rows))) for rows in logits]


@pytest.mark.parametrize("n", [0, 1, 3, 31, 257])
def test_tags_equal_a_loop(n: int) -> None:
    random = torch.Generator().manual_seed(n)
    outputs = outputs_of(torch.randn(4, n, 10, generator=random, dtype=torch.float64))
    labels = torch.randint(10, (n,), generator=random)
    cost = [0.1, 0.4, 0.7, 1.0]
    tags = exit_tags(outputs, labels, torch.tensor(cost, dtype=torch.float64))
    assert tags.dtype == torch.int64
    assert tags.tolist() == looped_tags(outputs, labels, cost)
    assert n < 31 or len(set(tags.tolist())) == 4


def test_ties_go_to_the_earlier_exit() -> None:
    same = torch.randn(1, 31, 10).expand(4, 31, 10)
    labels = torch.arange(31) % 10
    assert exit_tags(outputs_of(same), labels, torch.tensor([0.5, 0.5, 0.5, 0.5])).tolist() == [0] * 31
    assert exit_tags(outputs_of(same), labels, torch.tensor([1.0, 0.5, 1.0, 0.5])).tolist() == [1] * 31


def test_random_tags_come_from_the_seed() -> None:
    tags = random_tags(257, 3, seed=1)
    assert torch.equal(tags, random_tags(257, 3, seed=1))
    assert not torch.equal(tags, random_tags(257, 3, seed=2))
    assert (tags.bincount() > 257 / 8).tolist() == [True] * 4


def test_refreshing_leaves_the_network_as_it_was() -> None:
    net = small_net().train()
    net.stages[0].eval()
    images = numbered_images(31)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    tags = refreshed(net, batches(images, 7, 0), 0.5 * net.cost)
    assert tags.tolist() == tags_one_by_one(net, images, 0.5)
    assert [module.training for module in net.modules()] == flags
    assert len(set(flags)) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    swapped = refreshed(net, batches(images, 7, 0), 0.5 * net.cost, lambda outputs, labels: (labels + 1) % 3)
    assert not torch.equal(swapped, tags)
