"""Exit tags against a loop, and that they follow their samples through shuffled epochs."""

import copy
import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from networks import lived_in
from torch.utils.data import Subset

from eefast import EarlyExitNet, ExitOutput, zoo
from eefast.data.image_sets import ImageFiles, ImageTensors
from eefast.data.loaders import batches
from eefast.train.batches import EpochOrder, EpochSeeds, Indexed, training_batches
from eefast.train.module import EarlyExitModule
from eefast.train.tags import exit_tags, random_tags, refreshed


def outputs_of(logits: torch.Tensor) -> list[ExitOutput]:
    return [ExitOutput(rows, torch.zeros(len(rows)), torch.zeros(len(rows))) for rows in logits]


def looped(outputs: list[ExitOutput], labels: torch.Tensor, cost: list[float]) -> list[int]:
    tags = []
    for row, label in enumerate(labels.tolist()):
        prices = []
        for out, c in zip(outputs, cost, strict=True):
            values = out.logits[row].double().tolist()
            prices.append(math.log(sum(math.exp(v - max(values)) for v in values)) + max(values) - values[label] + c)
        tags.append(prices.index(min(prices)))
    return tags


@pytest.mark.parametrize("n", [0, 1, 3, 31, 257])
def test_tags_equal_a_loop(n: int) -> None:
    random = torch.Generator().manual_seed(n)
    outputs = outputs_of(torch.randn(4, n, 10, generator=random, dtype=torch.float64))
    labels = torch.randint(10, (n,), generator=random)
    cost = [0.1, 0.4, 0.7, 1.0]
    tags = exit_tags(outputs, labels, torch.tensor(cost, dtype=torch.float64))
    assert tags.dtype == torch.int64
    assert tags.tolist() == looped(outputs, labels, cost)
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


def small_net() -> EarlyExitNet:
    torch.manual_seed(0)
    return lived_in(zoo.eenet("eenet20", 2, "linear", "conv1", 3, (1, 8, 8), normalization=([0.5], [0.25])), seed=1)


def numbered_images(n: int) -> ImageTensors:
    """Image i carries i in its first pixel."""
    images = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    images[:, 0, 0, 0] = torch.arange(n, dtype=torch.uint8)
    return ImageTensors(images, torch.arange(n) % 3)


@torch.no_grad()
def brute_force(net: EarlyExitNet, images: ImageTensors, cost_weight: float) -> list[int]:
    net = copy.deepcopy(net).eval()
    tags = []
    for i in range(len(images)):
        outputs = net.all_exits(net.prepare(images.images[i : i + 1]))
        tags += looped(outputs, images.labels[i : i + 1], [c * cost_weight for c in net.cost.tolist()])
    return tags


def test_refreshing_leaves_the_network_as_it_was() -> None:
    net = small_net().train()
    net.stages[0].eval()
    images = numbered_images(31)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    tags = refreshed(net, batches(images, 7, 0), 0.5 * net.cost)
    assert tags.tolist() == brute_force(net, images, 0.5)
    assert [module.training for module in net.modules()] == flags
    assert len(set(flags)) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    swapped = refreshed(net, batches(images, 7, 0), 0.5 * net.cost, lambda outputs, labels: (labels + 1) % 3)
    assert not torch.equal(swapped, tags)


@pytest.mark.parametrize("kind", ["tensors", "subset", "files"])
def test_the_index_comes_with_the_sample(kind: str, tmp_path) -> None:
    images = numbered_images(31)
    order = list(range(30, -1, -1))
    if kind == "subset":
        dataset = Indexed(Subset(images, order))
    elif kind == "files":
        from PIL import Image

        Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
        files = ImageFiles([(tmp_path / "x.png", i % 3) for i in range(31)], lambda image: torch.zeros(1))
        assert Indexed(files)[5][1:] == (2, 5)
        seen = [batch[1:] for batch in training_batches(files, 7, 1, 0)]
        assert all(torch.equal(labels, index % 3) for labels, index in seen)
        assert len(seen) == 4
        return
    else:
        dataset = Indexed(images)
    loader = training_batches(dataset.dataset, 7, 1, 0)
    for pictures, labels, index in loader:
        number = torch.tensor(order)[index] if kind == "subset" else index
        assert torch.equal(pictures[:, 0, 0, 0].long(), number)
        assert torch.equal(labels, number % 3)
    assert len(loader) == 4


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


class Watch(Callback):
    """Notes, at the first batch of every epoch, the tags, what they should be and which samples come with them."""

    def __init__(self, images: ImageTensors) -> None:
        self.images, self.found, self.expected, self.samples = images, [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        assert torch.equal(batch[0][:, 0, 0, 0].long(), batch[2])
        if index == 0:
            self.samples.append(batch[2].tolist())
            self.found.append(module.tags.tolist())
            self.expected.append(brute_force(module.net, self.images, 2.0))


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:`isinstance.treespec, LeafSpec.`"
)  # Lightning
@pytest.mark.parametrize("first_epochs", [0, 2])
def test_tags_are_refreshed_once_per_epoch(first_epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from eefast.train import losses

    used = []

    def spy(outputs, labels, cost, tags=None):
        used.append(tags)
        return losses.exit_tagged(outputs, labels, cost, tags)

    monkeypatch.setitem(losses.LOSSES, "exit_tagged", spy)
    images = numbered_images(31)
    module = EarlyExitModule(
        small_net().train(),
        losses.parse("v4", cost_weight=2.0),
        first_epochs=first_epochs,
        tag_batches=batches(images, 10, 0),
        seed=5,
        schedule="constant",
    )
    loader, watch = training_batches(images, 8, 5, 0), Watch(images)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EpochSeeds(5, loader), watch],
    )
    trainer.fit(module, loader)
    refreshed_from = max(1, first_epochs)
    random = random_tags(31, 2, 5).tolist()
    assert watch.found == [random] * refreshed_from + watch.expected[refreshed_from:]
    assert random != watch.expected[0]
    assert len(set(map(tuple, watch.samples))) == 4
    # Three batches an epoch; the first stage's loss knows no tags.
    assert len(used) == 3 * (4 - first_epochs)
    tags = watch.found[first_epochs]
    assert used[0].tolist() == [tags[sample] for sample in watch.samples[first_epochs]]
