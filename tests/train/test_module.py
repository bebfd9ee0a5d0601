"""The Lightning module: when tags are refreshed, what is trained of a frozen network, when it stops as diverged."""

import math
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tagged_images import numbered_images, small_net, tags_one_by_one
from training_runs import RESUMABLE, trained

import eefast
from eefast.data.image_sets import ImageTensors
from eefast.data.loaders import batches
from eefast.surgery.attachment import new_parameters
from eefast.train import losses
from eefast.train import module as module_file
from eefast.train.batches import EpochSeeds, training_batches
from eefast.train.module import DivergedError, EarlyExitModule
from eefast.train.tags import random_tags


class Watch(Callback):
    """Notes, at the first batch of every epoch, the tags, what they should be and which samples come with them."""

    def __init__(self, images: ImageTensors) -> None:
        self.images, self.found, self.expected, self.samples = images, [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        assert torch.equal(batch[0][:, 0, 0, 0].long(), batch[2])
        if index == 0:
            self.samples.append(batch[2].tolist())
            self.found.append(module.tags.tolist())
            self.expected.append(tags_one_by_one(module.net, self.images, 2.0))


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:`isinstance.treespec, LeafSpec.`"
)  # Lightning
@pytest.mark.parametrize("first_epochs", [0, 2])
def test_tags_are_refreshed_once_per_epoch(first_epochs: int, monkeypatch: pytest.MonkeyPatch) -> None:
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


DIVERGING = {**RESUMABLE, "optimizer": "sgd", "schedule": "constant", "epochs": 3}


def test_divergence_in_the_first_epoch_leaves_no_checkpoint(small_mnist: Path, tmp_path: Path) -> None:
    message = r"training diverged: the loss is NaN or infinite in step \d+ of epoch 1; lower learning_rate=1e\+30$"
    with pytest.raises(RuntimeError, match=message):
        trained(data_root=small_mnist, output=tmp_path, learning_rate=1e30, **DIVERGING)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "started.json"]


@pytest.mark.parametrize(
    ("spoilt", "message", "epochs"),
    [
        ("loss", r"the loss is NaN or infinite in step 5 of epoch 3; .*; last\.ckpt has epoch 2$", 2),
        # The last step of an epoch breaks the weights: no loss has shown it when the checkpoints are due.
        ("weights", r"weights are NaN or infinite at the end of epoch 2; .*; last\.ckpt has epoch 1$", 1),
    ],
    ids=["loss", "weights"],
)
def test_divergence_stops_at_once_and_keeps_the_last_good_epoch(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str, message: str, epochs: int
) -> None:
    step = EarlyExitModule.training_step

    def spoiling(module, batch, index):
        if (spoilt, module.current_epoch, index) == ("loss", 2, 4):
            for head in module.net.heads:
                head.classifier.bias.data[0] = math.nan
        loss = step(module, batch, index)
        if (spoilt, module.current_epoch, index) == ("weights", 1, 11):
            module.net.heads[0].classifier.bias.data[0] = math.inf
        return loss

    monkeypatch.setattr(EarlyExitModule, "training_step", spoiling)
    with pytest.raises(DivergedError, match=message):
        trained(data_root=small_mnist, output=tmp_path, **DIVERGING)
    for name in ("best.ckpt", "last.ckpt"):
        found = torch.load(tmp_path / name, weights_only=True)
        assert all(value.isfinite().all() for value in found["state_dict"].values())
    assert found["epoch"] == epochs - 1
    assert not (tmp_path / "model.safetensors").exists()


@pytest.fixture
def frozen() -> EarlyExitModule:
    return EarlyExitModule(small_net(), "early_supervision", frozen=True, self_labelled=True)


@pytest.mark.parametrize("training", [True, False])
def test_of_a_frozen_network_the_early_heads_learn(frozen: EarlyExitModule, training: bool) -> None:
    """The backbone and its head stay in eval mode, so that their BatchNorm statistics do not change."""
    new = {name for name, _ in new_parameters(frozen.net)}
    assert {name for name, p in frozen.net.named_parameters() if p.requires_grad} == new
    assert new
    assert frozen.train(training) is frozen
    assert [head.training for head in frozen.net.heads] == [training, training, False]
    assert not any(module.training for stage in frozen.net.stages for module in stage.modules())


def test_without_freezing_everything_learns() -> None:
    module = EarlyExitModule(small_net(), "v0")
    assert all(parameter.requires_grad for parameter in module.net.parameters())
    assert all(part.training for part in module.net.modules())


def test_the_backbone_s_answers_replace_the_labels(frozen: EarlyExitModule) -> None:
    outputs = frozen.net.all_exits(torch.randn(31, 1, 8, 8))
    wrong = torch.full((31,), 7)
    assert torch.equal(frozen.targets(outputs, wrong), outputs[-1].logits.argmax(dim=1))
    assert torch.equal(EarlyExitModule(frozen.net, "v0").targets(outputs, wrong), wrong)


def test_held_out_images_are_judged_by_the_loss_of_the_last_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first stage too, so that epochs can be compared."""
    module = EarlyExitModule(small_net(), losses.parse("v2", 3.0), first_epochs=2).eval()
    logged = {}
    monkeypatch.setattr(module, "log_dict", lambda metrics, batch_size, sync_dist: logged.update(metrics))
    images, labels = numbered_images(31)[:]
    module.validation_step((images, labels), 0)
    outputs = module.net.all_exits(module.net.prepare(images))
    answers = [out.logits.argmax(dim=1) for out in outputs]
    assert logged.pop("held_out_loss") == losses.parse("v2", 3.0)(outputs, labels, module.net.cost)
    right = {f"accuracy_exit_{i}": float((a == labels).float().mean()) for i, a in enumerate(answers)}
    same = {f"agreement_exit_{i}": float((a == answers[-1]).float().mean()) for i, a in enumerate(answers[:-1])}
    assert {name: float(value) for name, value in logged.items()} == {**right, **same}


def test_a_teacher_is_asked_about_the_augmented_images_and_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = small_net().train()
    module = EarlyExitModule(small_net(), "v0+0.5*taught", shift=2, teacher=teacher)
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    teacher.eval()  # for what is expected below; the module has its own
    assert not [name for name in module.state_dict() if "teacher" in name]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    shown, logged = [], {}
    monkeypatch.setattr(module_file, "random_shift", lambda images, shift: shown.append(images.flip(2)) or shown[-1])
    monkeypatch.setattr(module, "log", lambda name, value, **_: logged.update({name: value.item()}))
    monkeypatch.setattr(module, "_check", lambda loss, index: None)
    images, labels = numbered_images(31)[:]
    module.training_step((images, labels, torch.arange(31)), 0).backward()
    with torch.no_grad():
        taught = teacher.all_exits(teacher.prepare(shown[0]))[-1].logits
        outputs = module.net.all_exits(module.net.prepare(shown[0]))
    expected = losses.deep_supervision(outputs, labels, module.net.cost) + 0.5 * losses.taught(outputs, taught)
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_network_may_teach_itself_as_it_was() -> None:
    net = small_net()
    module = EarlyExitModule(net, "taught", teacher=net)
    assert any(p.requires_grad for p in module.parameters())
    images = numbered_images(5)[:][0]
    before = module.taught(images)
    with torch.no_grad():
        net.heads[-1].classifier.weight += 1
    assert torch.equal(module.taught(images), before)


@pytest.mark.parametrize(("loss", "first_epochs", "asked"), [("v0", 0, 0), ("v0+taught", 1, 0), ("v0+taught", 0, 1)])
def test_a_teacher_is_asked_where_the_loss_reads_it(
    monkeypatch: pytest.MonkeyPatch, loss: str, first_epochs: int, asked: int
) -> None:
    module = EarlyExitModule(small_net(), loss, first_epochs=first_epochs, teacher=small_net())
    calls: list[int] = []
    taught = module.taught
    monkeypatch.setattr(module, "taught", lambda images: calls.append(0) or taught(images))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "_check", lambda loss, index: None)
    images, labels = numbered_images(5)[:]
    module.training_step((images, labels, torch.arange(5)), 0)
    assert len(calls) == asked


def test_a_loss_with_a_teacher_needs_one_of_the_same_classes() -> None:
    with pytest.raises(ValueError, match="this loss is taught by another network; give teacher"):
        EarlyExitModule(small_net(), "v0+taught")
    other = eefast.zoo.eenet("eenet20", 2, "linear", num_classes=7, input_shape=(1, 8, 8))
    with pytest.raises(ValueError, match="teacher knows 7 classes, the network to train 3"):
        EarlyExitModule(small_net(), "v0+taught", teacher=other)


@pytest.mark.parametrize("wrong", [{"shift": 1}, {"flip": True}])
def test_rows_are_not_augmented_as_images(wrong: dict) -> None:
    rows = eefast.zoo.eenet("eenet20-1d", 1, num_classes=5, input_shape=(6, 128))
    with pytest.raises(ValueError, match="rows are neither shifted nor mirrored; leave both out"):
        EarlyExitModule(rows, "v0", **wrong)


def test_a_loss_with_tags_needs_images_to_tag() -> None:
    with pytest.raises(ValueError, match="this loss uses exit tags; give tag_batches"):
        EarlyExitModule(small_net(), "v0+v4")
