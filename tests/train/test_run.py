"""From images to a folder with a calibrated network: real runs, frozen backbones, options that do not fit."""

import json
import re
from pathlib import Path

import pytest
import torch
from training_runs import trained

from eefast import criteria, zoo
from eefast.checkpoint.loading import load
from eefast.data import datasets
from eefast.surgery import backbone as library_backbone
from eefast.surgery.attachment import new_parameters


def test_training_run(small_mnist: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"epochs": 5, "batch_size": 16, "learning_rate": 0.03, "held_out": 300, "max_accuracy_drop": 0.02}
    report = trained(
        net="eenet8", num_exits=2, placement="linear", data_root=small_mnist, output=tmp_path, test=True, **options
    )

    assert report.exit_accuracy[-1] > 0.4
    assert report.held_out["learned"].accuracy >= report.exit_accuracy[-1] - 0.02 - 1e-9
    assert report.held_out["learned"].cost < 0.98
    assert report.test["learned"].thresholds == report.held_out["learned"].thresholds
    assert report.test["learned"].accuracy > 0.35
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(r"epoch 5/5: loss [\d.]+, held-out loss [\d.]+, accuracy % by exit [\d. ]+, \d+ s", err)
    assert len(report.seconds_per_epoch) == 5

    net = load(tmp_path).eval()
    images, labels = datasets.dataset("mnist", small_mnist, "test")[:]
    result = net(images)
    assert (result.labels == labels).double().mean().item() == pytest.approx(report.test["learned"].accuracy)
    assert result.cost.double().mean().item() == pytest.approx(report.test["learned"].cost, abs=1e-6)
    thresholds = json.loads((tmp_path / "thresholds.json").read_text())
    assert list(thresholds) == list(criteria.CRITERIA)
    assert thresholds["learned"] == net.thresholds.tolist()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["held_out"]["entropy"]["cost"] == report.held_out["entropy"].cost
    assert written["arguments"]["seed"] == 1
    assert str(tmp_path) not in (tmp_path / "report.json").read_text()
    checkpoint = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["net.heads.0.classifier.weight"], net.heads[0].classifier.weight)


def test_same_seed_same_network(small_mnist: Path, tmp_path: Path) -> None:
    weights = []
    for run, seed in enumerate((7, 7, 8)):
        output = tmp_path / str(run)
        options = {"epochs": 1, "held_out": 700, "shift": 2, "optimizer": "sgd", "loss": "v2+correctness"}
        trained(net="eenet8", num_exits=2, data_root=small_mnist, output=output, seed=seed, **options)
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_heads_learn_the_answers_of_a_frozen_backbone(colours: Path, tmp_path: Path) -> None:
    """PTEENet: the backbone alone (v6), then heads that agree with it, though every label is wrong."""
    options = {
        "dataset": "folder", "image_size": 8, "num_exits": 2, "placement": "linear", "held_out": 60, "batch_size": 16,
        "head": "bnpool", "max_accuracy_drop": 1.0, "device": "cpu",
    }  # fmt: skip
    first = trained(net="eenet20", output=tmp_path / "right", data_root=colours, loss="pteenet_v6", epochs=4, **options)
    assert first.exit_accuracy[-1] > 0.9
    assert max(first.exit_agreement[:-1]) < 0.7

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name, other in (("blue", "green"), ("green", "red"), ("red", "blue")):
        (wrong / other).symlink_to(colours / "train" / name)
    second = trained(
        net="eenet20",
        output=tmp_path / "heads",
        data_root=wrong,
        weights=tmp_path / "right",
        freeze_backbone=True,
        self_labelled=True,
        loss="pteenet_v0+pteenet_v5",
        epochs=4,
        **options,
    )
    assert min(second.exit_agreement) > 0.9
    assert max(second.exit_accuracy) < 0.1
    assert min(second.held_out_agreement.values()) > 0.9
    before, after = (load(tmp_path / name).state_dict() for name in ("right", "heads"))
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    new = {name for name, _ in new_parameters(load(tmp_path / "heads"))}
    statistics = {name for name in before if name.startswith(("heads.0.norm.", "heads.1.norm."))}
    # "pteenet_v5" knows no confidence at the final exit.
    unused = {"heads.2.confidence.weight", "heads.2.confidence.bias"}
    assert changed - {"thresholds"} == new - unused | statistics


def test_exits_learn_from_another_network(colours: Path, tmp_path: Path) -> None:
    """The answers of a teacher that calls each colour by another's name."""
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name, other in (("blue", "green"), ("green", "red"), ("red", "blue")):
        (wrong / other).symlink_to(colours / "train" / name)
    options = {
        "net": "eenet20", "dataset": "folder", "image_size": 8, "num_exits": 2, "placement": "linear", "held_out": 60,
        "batch_size": 16, "head": "bnpool", "max_accuracy_drop": 1.0, "device": "cpu", "epochs": 4,
    }  # fmt: skip
    teacher = {"output": tmp_path / "teacher", "data_root": wrong, **options}
    trained(loss="final_supervision", **teacher)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    taught = {"data_root": colours, "teacher": tmp_path / "teacher", "loss": "taught", **options}
    report = trained(output=tmp_path / "taught", **taught)
    assert max(report.exit_accuracy) < 0.1
    assert min(report.exit_agreement) > 0.9
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before


def test_a_teacher_for_other_images(small_mnist: Path, tmp_path: Path) -> None:
    zoo.eenet("eenet20", 1, "linear", "pool", 7, (1, 28, 28)).save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' has num_classes=7, the network to train 10; choose a teacher for"):
        trained(data_root=small_mnist, output=tmp_path / "run", loss="taught", teacher=tmp_path / "other", held_out=300)
    with pytest.raises(FileNotFoundError, match=r"teacher='.*none': there is no such folder; give one that eefast"):
        trained(data_root=small_mnist, output=tmp_path / "run", loss="taught", teacher=tmp_path / "none", held_out=300)
    bare = zoo.eenet("eenet20", 1, "linear", "pool", 10, (1, 28, 28))
    bare.save(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare' has no normalization, so that it takes no images of a data set"):
        trained(data_root=small_mnist, output=tmp_path / "run", loss="taught", teacher=tmp_path / "bare", held_out=300)
    images = datasets.dataset("mnist", small_mnist, "train")
    bare.record = datasets.record("eenet20", 10, (1, 28, 28), "fashion-mnist", images, 300, 1)
    bare.save(tmp_path / "fashion")
    with pytest.raises(ValueError, match=r"fashion' was trained on fashion-mnist, and this is mnist; choose a teacher"):
        trained(
            data_root=small_mnist, output=tmp_path / "run", loss="taught", teacher=tmp_path / "fashion", held_out=300
        )
    assert not (tmp_path / "run").exists()


def test_a_teacher_for_other_classes(colours: Path, tmp_path: Path) -> None:
    other = zoo.eenet("eenet20", 2, num_classes=3, input_shape=(3, 8, 8), normalization=([0.5] * 3, [0.2] * 3))
    other.classes = ("bus", "car", "van")
    other.save(tmp_path / "other")
    with pytest.raises(ValueError, match=r"other' knows the classes bus, car, van, the network to train blue, green, "):
        trained(
            net="eenet20", dataset="folder", image_size=8, data_root=colours, held_out=60, loss="taught",
            batch_size=16, teacher=tmp_path / "other", output=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("backbone", "exits"), [("torchvision:resnet18", ["layer1", "layer2"]), ("timm:resnet10t", ["layer1", "layer2.0"])]
)
def test_exits_attached_to_a_backbone(colours: Path, tmp_path: Path, backbone: str, exits: list[str]) -> None:
    torch.manual_seed(0)
    network = library_backbone(backbone, 3)
    torch.save(
        {"state_dict": {f"module.{name}": v for name, v in network.state_dict().items()}}, tmp_path / "weights.pth"
    )
    report = trained(
        dataset="folder",
        data_root=colours,
        image_size=32,
        backbone=backbone,
        exits=exits,
        head="conv1",
        weights=tmp_path / "weights.pth",
        freeze_backbone=True,
        loss="early_supervision+correctness",
        learning_rate=0.003,
        epochs=2,
        batch_size=16,
        held_out=60,
        output=tmp_path / "out",
        test=True,
    )
    assert report.exit_accuracy[0] > 0.6
    assert len(report.exit_agreement) == 3
    net = load(tmp_path / "out")
    images = torch.stack([datasets.dataset("folder", colours, "test", image_size=32)[i][0] for i in range(9)])
    labels = torch.arange(9) // 3
    result = net(images)
    assert (result.labels == labels).double().mean().item() == pytest.approx(report.test["learned"].accuracy)
    with torch.no_grad():
        final = net.all_exits(net.prepare(images))[-1].logits
        mean, std = (torch.tensor(part).view(3, 1, 1) for part in net.normalization)
        expected = network.eval()((images / 255 - mean) / std)
    assert torch.allclose(final, expected, atol=1e-5)
    assert (result.labels == final.argmax(dim=1)).double().mean().item() == report.test_agreement["learned"]


TRANSFER = {
    "dataset": "folder", "image_size": 32, "backbone": "torchvision:resnet18", "exits": ["layer1"], "held_out": 60,
    "train_images": 16, "batch_size": 16, "epochs": 1, "max_accuracy_drop": 1.0, "device": "cpu", "learning_rate": 1e-9,
}  # fmt: skip


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Weights of 5 classes, in torchvision's cache under the name of its own of 1000."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.manual_seed(3)
    weights = library_backbone("torchvision:resnet18", 5).state_dict()
    (tmp_path / "cache/hub/checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "cache/hub/checkpoints/resnet18-f37072fd.pth")
    return weights


@pytest.mark.slow
def test_published_weights_start_a_network_of_other_classes(
    colours: Path, tmp_path: Path, published: dict[str, torch.Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    trained(data_root=colours, output=tmp_path / "out", weights="IMAGENET1K_V1", **TRANSFER)
    err = capfd.readouterr().err
    assert "for another number of classes: the last linear 'fc' starts from random weights, for 3" in err
    net = load(tmp_path / "out")
    body = {name.split(".", 2)[2]: value for name, value in net.state_dict().items() if name.startswith("stages")}
    learned = {name for name in published if "running" not in name and "num_batches" not in name}
    taken = {name for name in learned & set(body) if torch.allclose(body[name], published[name], atol=1e-6)}
    assert taken == learned - {"fc.weight", "fc.bias"}
    assert net.num_classes == 3
    assert json.loads((tmp_path / "out/report.json").read_text())["arguments"]["train_images"] == 16


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "IMAGENET1K_V1", "freeze_backbone": True}, "freeze_backbone=True keeps the last linear 'fc', but"),
        ({"weights": "IMAGENET1K_V9"}, "weights='IMAGENET1K_V9' is no file and no weights of torchvision:resnet18, wh"),
    ],
)
def test_published_weights_that_do_not_fit(
    colours: Path, tmp_path: Path, published: dict[str, torch.Tensor], changed: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(**{"data_root": colours, "output": tmp_path / "out", **TRANSFER, **changed})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"held_out": 890}, "held_out=890 of 900 training images leaves no batch of batch_size=128"),
        ({"max_cost": 0.05}, "max_cost=0.05 is less than the first exit costs, 0.12"),
        ({"device": "abacus"}, "abacus"),
        ({"image_size": 32}, "image_size=32: the images of mnist have one size"),
        ({"dataset": "emnist"}, "dataset='emnist' is unknown"),
        ({"net": "eenet19"}, "net='eenet19' is unknown; choose one of eenet8, "),
        ({"net": "resnet18"}, "or a network of torchvision or timm with backbone and exits: --backbone torchvision:"),
        ({"backbone": "resnet18", "exits": ["layer1"]}, "backbone='resnet18' must be torchvision:NAME or timm:NAME"),
        ({"train_images": 601}, "train_images=601 must be at least batch_size=128 and at most 600"),
        ({"train_images": 127}, "train_images=127 must be at least batch_size=128"),
    ],
)
def test_options_that_do_not_fit_leave_no_files(small_mnist: Path, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(**{"data_root": small_mnist, "output": tmp_path / "trained", "held_out": 300, **changed})
    assert not (tmp_path / "trained").exists()
