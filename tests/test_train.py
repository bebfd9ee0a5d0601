"""Losses against loops over samples, augmentation, and a real training run from images to a calibrated network."""

import gzip
import json
import math
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data import idx_bytes

from eefast import ExitOutput, criteria
from eefast.checkpoint import load
from eefast.train import data, losses
from eefast.train.augment import random_shift
from eefast.train.run import train

COST = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)


def make_outputs(n: int, classes: int, scale: float = 1.0) -> tuple[list[ExitOutput], torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    outputs = []
    for _ in COST:
        logits = scale * torch.randn(n, classes, generator=random, dtype=torch.float64)
        z = scale * torch.randn(n, generator=random, dtype=torch.float64)
        outputs.append(ExitOutput(logits, torch.sigmoid(z), z))
    return outputs, torch.randint(classes, (n,), generator=random)


def softmax(row: torch.Tensor) -> list[float]:
    powers = [math.exp(v) for v in row.tolist()]
    return [p / sum(powers) for p in powers]


def looped(name: str, outputs: list[ExitOutput], labels: torch.Tensor, cost: torch.Tensor) -> float:
    """The losses as the paper writes them, sample by sample in plain Python."""
    total = 0.0
    for row, label in enumerate(labels.tolist()):
        p = [softmax(out.logits[row])[label] for out in outputs]
        h = [1 / (1 + math.exp(-out.confidence_logit[row].item())) for out in outputs]
        if name == "deep_supervision":
            total += sum(-math.log(v) for v in p)
        elif name == "mixtures":
            mixture, mixed_cost = p[-1], cost[-1].item()
            total += -math.log(mixture) + mixed_cost
            for i in range(len(outputs) - 2, -1, -1):
                mixture = h[i] * p[i] + (1 - h[i]) * mixture
                mixed_cost = h[i] * cost[i].item() + (1 - h[i]) * mixed_cost
                total += -math.log(mixture) + mixed_cost
        else:
            for i, out in enumerate(outputs):
                values = out.logits[row].tolist()
                total += -math.log(h[i] if values.index(max(values)) == label else 1 - h[i])
    return total / len(labels)


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize(("n", "classes"), [(1, 2), (3, 10), (31, 7)])
def test_losses_equal_loops(name: str, n: int, classes: int) -> None:
    outputs, labels = make_outputs(n, classes)
    found = losses.LOSSES[name](outputs, labels, COST)
    assert found.item() == pytest.approx(looped(name, outputs, labels, COST), rel=1e-12)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_have_the_right_gradient(name: str) -> None:
    outputs, labels = make_outputs(3, 5)
    leaves = [tensor.requires_grad_() for out in outputs for tensor in (out.logits, out.confidence_logit)]

    def of_leaves(*tensors: torch.Tensor) -> torch.Tensor:
        exits = [ExitOutput(a, torch.sigmoid(b), b) for a, b in zip(tensors[::2], tensors[1::2], strict=True)]
        return losses.LOSSES[name](exits, labels, COST)

    assert torch.autograd.gradcheck(of_leaves, leaves)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_survive_what_underflows(name: str) -> None:
    outputs, labels = make_outputs(31, 10, scale=400.0)
    outputs = [ExitOutput(*(part.float().requires_grad_() for part in out)) for out in outputs]
    naive = outputs[0].logits.softmax(dim=1)[range(31), labels].log()
    assert naive.isinf().any()
    found = losses.LOSSES[name](outputs, labels, COST.float())
    found.backward()
    assert found.isfinite()
    parts = [grad for out in outputs for grad in (out.logits.grad, out.confidence_logit.grad) if grad is not None]
    assert parts
    assert all(grad.isfinite().all() for grad in parts)


def test_correctness_teaches_the_confidence_only() -> None:
    outputs, labels = make_outputs(31, 10)
    for out in outputs:
        out.logits.requires_grad_()
        out.confidence_logit.requires_grad_()
    losses.correctness(outputs, labels, COST).backward()
    for out in outputs:
        assert out.logits.grad is None
        right = out.logits.argmax(dim=1) == labels
        # Downhill raises the confidence of right answers and lowers that of wrong ones.
        assert torch.equal(out.confidence_logit.grad < 0, right)


def test_loss_text() -> None:
    assert losses.parse("v2").terms == ((1.0, "mixtures"),)
    parsed = losses.parse("v0 + 0.5*correctness+2 * mixtures", cost_weight=3.0)
    assert parsed.terms == ((1.0, "deep_supervision"), (0.5, "correctness"), (2.0, "mixtures"))
    outputs, labels = make_outputs(3, 5)
    parts = {name: looped(name, outputs, labels, 3 * COST) for name in losses.LOSSES}
    expected = parts["deep_supervision"] + 0.5 * parts["correctness"] + 2 * parts["mixtures"]
    assert parsed(outputs, labels, COST).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", ["", "v9", "v0+", "x*v0", "-1*v0", "0*v0", "nan*v0", "v0*2"])
def test_loss_text_malformed(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no term; write name or weight\*name, name in deep_supervision"):
        losses.parse(text)


@pytest.mark.parametrize("shape", [(1, 1, 3, 5), (31, 3, 7, 4), (0, 1, 28, 28)])
def test_random_shift_moves_whole_images(shape: tuple[int, ...]) -> None:
    images = torch.randint(1, 256, shape, dtype=torch.uint8)
    shifted = random_shift(images, 2)
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.uint8
    height, width = shape[2:]
    for image, moved in zip(images.numpy(), shifted.numpy(), strict=True):
        candidates = []
        for dy in range(-2, 3):
            for dx in range(-2, 3):
                expected = np.zeros_like(image)
                for y in range(height):
                    for x in range(width):
                        if 0 <= y + dy < height and 0 <= x + dx < width:
                            expected[:, y, x] = image[:, y + dy, x + dx]
                candidates.append(expected)
        assert any(np.array_equal(moved, c) for c in candidates)


def test_random_shift_uses_every_offset() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 2] = 9
    torch.manual_seed(0)
    where = random_shift(image.expand(500, 1, 5, 5), 2).flatten(1).argmax(dim=1)
    assert sorted(set(where.tolist())) == list(range(25))


@pytest.fixture(scope="module")
def small_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,500 real images to train on and 300 to test on, cut from the shipped test set, in the published layout."""
    root = tmp_path_factory.mktemp("data")
    images, labels = data.mnist_test()
    for stem, part in (("train", slice(0, 1500)), ("t10k", slice(2000, 2300))):
        for kind, values in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part])):
            (root / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values.numpy()), 1))
    return root


def test_training_run(small_mnist: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = {"data_root": small_mnist, "epochs": 4, "batch_size": 32, "held_out": 300, "max_accuracy_drop": 0.02}
    report = train("eenet20", num_exits=2, placement="linear", output=tmp_path, test=True, **options)

    assert report.exit_accuracy[-1] > 0.9
    assert report.held_out["learned"].accuracy >= report.exit_accuracy[-1] - 0.02 - 1e-9
    assert report.held_out["learned"].cost < 0.95
    assert report.test["learned"].thresholds == report.held_out["learned"].thresholds
    assert report.test["learned"].accuracy > 0.85
    out, err = capfd.readouterr()
    assert out == ""
    assert re.search(r"epoch 4/4: loss [\d.]+, held-out loss [\d.]+, accuracy % by exit [\d. ]+, \d+ s", err)
    assert len(report.seconds_per_epoch) == 4

    net = load(tmp_path).eval()
    images, labels = data.dataset("mnist", small_mnist, "test")[:]
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
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["net.heads.0.classifier.weight"], net.heads[0].classifier.weight)


def test_same_seed_same_network(small_mnist: Path, tmp_path: Path) -> None:
    weights = []
    for run, seed in enumerate((7, 7, 8)):
        output = tmp_path / str(run)
        options = {"epochs": 1, "held_out": 1000, "shift": 2, "optimizer": "sgd", "loss": "v2+correctness"}
        train("eenet8", num_exits=2, data_root=small_mnist, output=output, seed=seed, **options)
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"held_out": 0}, "held_out=0 must be at least 1"),
        ({"held_out": 1490}, "held_out=1490 of 1500 training images leaves no batch of batch_size=128"),
        ({"loss": "v7"}, "loss='v7'"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop=-0.1 must lie in 0 … 1"),
        ({"max_cost": 0.05}, "max_cost=0.05 is less than the first exit costs, 0.12"),
        ({"device": "abacus"}, "abacus"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; choose one of adamw, sgd"),
        ({"dataset": "emnist"}, "dataset='emnist' is unknown"),
        ({"net": "eenet19"}, "name='eenet19' is unknown"),
    ],
)
def test_bad_arguments_leave_nothing_behind(small_mnist: Path, tmp_path: Path, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(**{"data_root": small_mnist, "output": tmp_path / "trained", "held_out": 300, **changed})
    assert not (tmp_path / "trained").exists()


def test_shipped_network() -> None:
    """The figures in the shipped network's README hold on the shipped test images."""
    folder = resources.files("eefast") / "assets" / "eenet-mnist"
    net = load(folder)
    images, labels = data.mnist_test()
    row = r"^\| (learned|max_probability) \|.*\| ([\d.]+) % \| ([\d.]+) % \|$"
    rows = re.findall(row, (folder / "README.md").read_text(), re.M)
    claims = {name: (float(accuracy) / 100, float(cost) / 100) for name, accuracy, cost in rows}
    assert list(claims) == ["learned", "max_probability"]

    thresholds = json.loads((folder / "thresholds.json").read_text())
    assert thresholds["learned"] == net.thresholds.tolist()
    measured = {}
    for name in claims:
        net.criterion = criteria.get(name)
        net.thresholds.copy_(torch.tensor(thresholds[name]))
        results = [net(batch) for batch in images.split(500)]
        right = torch.cat([r.labels for r in results]) == labels
        measured[name] = (right.double().mean().item(), torch.cat([r.cost for r in results]).double().mean().item())
        assert measured[name] == pytest.approx(claims[name], abs=1e-3)
    accuracy, cost = measured["learned"]
    assert accuracy >= 0.985
    assert cost <= 0.35
    assert (folder / "model.safetensors").stat().st_size <= 2 << 20
