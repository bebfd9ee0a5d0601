"""Augmentation, a real training run from images to a calibrated network, runs that are broken off, frozen backbones."""

import copy
import csv
import gzip
import inspect
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx_bytes
from kill_and_resume import same_run
from torch.utils.data import random_split
from typer.testing import CliRunner

from eefast import criteria, zoo
from eefast.checkpoint.loading import load
from eefast.cli.commands import app
from eefast.data import datasets
from eefast.surgery import backbone as backbones
from eefast.surgery.attachment import new_parameters
from eefast.train.augment import random_flip, random_shift
from eefast.train.module import SCHEDULES, EarlyExitModule
from eefast.train.run import train


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
    images, labels = datasets.mnist_test()
    for stem, part in (("train", slice(0, 1500)), ("t10k", slice(2000, 2300))):
        for kind, values in (("images-idx3", images[part, 0]), ("labels-idx1", labels[part])):
            (root / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values.numpy()), 1))
    return root


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of three colours in the layout of torchvision's ImageFolder."""
    from PIL import Image

    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 3)):
        for label, name in enumerate(("blue", "green", "red")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 200, (20, 25, 3), dtype=np.uint8)
                pixels[:, :, 2 - label] += 50
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
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
        options = {"epochs": 1, "held_out": 1000, "shift": 2, "optimizer": "sgd", "loss": "v2+correctness"}
        train("eenet8", num_exits=2, data_root=small_mnist, output=output, seed=seed, **options)
        weights.append((output / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_random_flip_mirrors_half_of_the_images() -> None:
    images = torch.randint(256, (257, 3, 5, 4), dtype=torch.uint8)
    torch.manual_seed(0)
    flipped = random_flip(images)
    assert flipped.dtype == torch.uint8
    mirrored = 0
    for image, found in zip(images.numpy(), flipped.numpy(), strict=True):
        is_mirrored = np.array_equal(found, image[:, :, ::-1])
        assert is_mirrored or np.array_equal(found, image)
        mirrored += is_mirrored
    assert 90 < mirrored < 167
    assert random_flip(images[:0]).shape == (0, 3, 5, 4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda step: 1.0),
        ("cosine", lambda step: (1 + math.cos(math.pi * step / 40)) / 2),
        ("step", lambda step: 0.1 ** ((step >= 20) + (step >= 30))),
    ],
)
def test_schedules(schedule: str, expected: Callable[[int], float]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule_of = SCHEDULES[schedule](optimizer, 0.3, 40)
    for step in range(40):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * expected(step))
        optimizer.step()
        schedule_of.step()


RESUMABLE = {
    "net": "eenet8",
    "num_exits": 2,
    "epochs": 4,
    "held_out": 1100,
    "batch_size": 32,
    "loss": "v4+v2",
    "two_stage": 1,
    "shift": 1,
    "flip": True,
    "device": "cpu",
}


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_runs_go_on_as_if_nothing_had_happened(colours: Path, tmp_path: Path) -> None:
    """Order, tags, augmentation and the crops made by worker processes included."""
    own = {"dataset": "folder", "image_size": 16, "held_out": 90, "batch_size": 16, "workers": 1}
    words = [tmp_path, colours, json.dumps({**RESUMABLE, **own}), "random", 2]
    # In a process of its own: worker processes forked from one that has many threads may hang or crash.
    script = Path(__file__).parents[1] / "helpers" / "kill_and_resume.py"
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same bits") == 2, done.stdout
    for killed in ("killed0", "killed1"):
        same_run(tmp_path / "whole", tmp_path / killed)
        assert len(torch.load(tmp_path / killed / "last.ckpt", weights_only=True)["seconds_per_epoch"]) == 4


@pytest.mark.usefixtures("one_thread")
def test_broken_run_goes_on_as_if_nothing_had_happened(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**RESUMABLE, "data_root": small_mnist}
    train(output=tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        step = EarlyExitModule.training_step

        def breaking(module, batch, index):
            if (module.current_epoch, index) == (2, 5):
                raise ArithmeticError
            return step(module, batch, index)

        patch.setattr(EarlyExitModule, "training_step", breaking)
        with pytest.raises(ArithmeticError):
            train(output=tmp_path / "broken", **options)
    with pytest.raises(ValueError, match=r"learning_rate=0\.5, but the run to resume has 0\.01"):
        train(output=tmp_path / "broken", resume=True, learning_rate=0.5, **options)
    train(output=tmp_path / "broken", resume=True, **options)
    same_run(tmp_path / "whole", tmp_path / "broken")
    # What is finished can be resumed too: nothing is left to train.
    train(output=tmp_path / "broken", resume=True, **options)
    same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.usefixtures("one_thread")
def test_a_moved_run_knows_its_best_epoch(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first epoch is made the best; after the move nothing is better, and the old folder is gone."""
    options = {**RESUMABLE, "data_root": small_mnist, "loss": "v0", "two_stage": 0, "epochs": 3}
    step = EarlyExitModule.training_step

    def worse(module, batch, index):
        if module.current_epoch == 1 and index == 0:
            for head in module.net.heads:
                head.classifier.weight.data.mul_(-30)
        if (module.current_epoch, index) == (stop, 3):
            raise ArithmeticError
        return step(module, batch, index)

    monkeypatch.setattr(EarlyExitModule, "training_step", worse)
    stop = None
    train(output=tmp_path / "whole", **options)
    stop = 2
    with pytest.raises(ArithmeticError):
        train(output=tmp_path / "before", **options)
    (tmp_path / "before").rename(tmp_path / "after")
    stop = None
    report = train(output=tmp_path / "after", resume=True, **options)
    assert report.best_epoch == 1
    same_run(tmp_path / "whole", tmp_path / "after")
    assert not (tmp_path / "before").exists()


def test_divergence_stops_at_once_and_keeps_the_last_good_epoch(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**RESUMABLE, "data_root": small_mnist, "optimizer": "sgd", "schedule": "constant", "epochs": 3}
    message = r"training diverged: the loss is no number in step \d+ of epoch 1; lower learning_rate=1e\+30$"
    with pytest.raises(RuntimeError, match=message):
        train(output=tmp_path / "first", learning_rate=1e30, **options)
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["logs", "started.json"]
    step = EarlyExitModule.training_step

    def spoilt(module, batch, index):
        loss = step(module, batch, index)
        if (module.current_epoch, index) == (2, 4):
            module._check(loss * math.nan, index)
        if (module.current_epoch, index) == (1, 11) and only_weights:
            module.net.heads[0].classifier.bias.data[0] = math.inf
        return loss

    monkeypatch.setattr(EarlyExitModule, "training_step", spoilt)
    only_weights = False
    with pytest.raises(RuntimeError, match=r"the loss is no number in step 5 of epoch 3; .*; last\.ckpt has epoch 2$"):
        train(output=tmp_path / "later", **options)
    for name in ("best.ckpt", "last.ckpt"):
        state = torch.load(tmp_path / "later" / name, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())
    assert not (tmp_path / "later" / "model.safetensors").exists()
    # The last step of an epoch breaks the weights: no loss has shown it when the checkpoints are due.
    only_weights = True
    with pytest.raises(
        RuntimeError, match=r"weights are no numbers at the end of epoch 2; .*; last\.ckpt has epoch 1$"
    ):
        train(output=tmp_path / "weights", **options)
    assert torch.load(tmp_path / "weights" / "last.ckpt", weights_only=True)["epoch"] == 0


def test_resume_without_a_checkpoint(small_mnist: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A wrong folder is told; a run that was broken off in its first epoch starts again."""
    with pytest.raises(FileNotFoundError, match=r"resume=True: there is no .*last\.ckpt"):
        train(data_root=small_mnist, output=tmp_path, resume=True, **RESUMABLE)
    options = {**RESUMABLE, "data_root": small_mnist, "loss": "v0", "two_stage": 0, "epochs": 1}
    arguments = train(output=tmp_path, **options).arguments
    report = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "started.json").write_text(json.dumps({"arguments": arguments}))
    with pytest.raises(ValueError, match=r"seed=2, but the run to resume has 1"):
        train(output=tmp_path, resume=True, **{**options, "seed": 2})
    capfd.readouterr()
    train(output=tmp_path, resume=True, **options)
    assert f"resume: no epoch of the run in {tmp_path} was finished, it starts again\n" in capfd.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == report
    # last.ckpt is of an earlier run in the same folder.
    (tmp_path / "started.json").write_text(json.dumps({"arguments": {**arguments, "seed": 2}}))
    train(output=tmp_path, resume=True, **{**options, "seed": 2})
    assert "it starts again" in capfd.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() != report
    (tmp_path / "started.json").write_text("[]")
    with pytest.raises(ValueError, match=r"started\.json is damaged; delete it"):
        train(output=tmp_path, resume=True, **options)


class Hostile:
    def __reduce__(self):
        return Path.touch, (Path(self.target),)


@pytest.fixture(scope="module")
def finished(small_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("finished")
    options = {**RESUMABLE, "data_root": small_mnist, "loss": "v0", "two_stage": 0, "epochs": 1}
    train(output=folder, **options)
    return folder, options


def changed_file(content: bytes, kind: str, folder: Path) -> bytes | None:
    """The checkpoint's bytes after some mishap; None for what is no file at all."""
    if kind == "a folder":
        return None
    if kind == "empty":
        return b""
    if kind == "text":
        return b"# nothing\n" * 50
    if kind == "zeros":
        return bytes(len(content))
    if kind.startswith("cut"):
        return content[: int(float(kind[4:]) * len(content))]
    if kind == "a flipped bit":
        # In the first weights, which fill a good part of the file.
        where = content.index(
            torch.load(io.BytesIO(content))["state_dict"]["net.stages.0.0.0.weight"].numpy().tobytes()
        )
        return content[:where] + bytes([content[where] ^ 64]) + content[where + 1 :]
    found = torch.load(io.BytesIO(content), weights_only=True)
    if kind == "code":
        found["code"] = Hostile()
        found["code"].target = str(folder / "executed")
    elif kind == "another program's":
        found = {"model": found["state_dict"]}
    elif kind == "a list":
        found = [1, 2]
    elif kind == "newer":
        found["format"] = 2
    elif kind == "lacks a weight":
        del found["state_dict"]["net.heads.0.classifier.weight"]
    elif kind == "lacks the optimiser":
        del found["optimizer_states"]
    elif kind == "odd epochs":
        found["seconds_per_epoch"], found["epoch"] = 3, "one"
    elif kind == "odd loops":
        found["loops"] = {"fit_loop": None}
    elif kind == "odd callbacks":
        found["callbacks"] = dict.fromkeys(found["callbacks"], 3)
    file = io.BytesIO()
    torch.save(found, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a folder", "is no intact checkpoint: it is no regular file"),
        ("empty", "is no intact checkpoint: it is empty"),
        ("text", "is no intact checkpoint: File is not a zip file"),
        ("zeros", "is no"),
        ("cut 0.01", "is no"),
        ("cut 0.5", "is no"),
        ("cut 0.999", "is no"),
        ("a flipped bit", "is no intact checkpoint"),
        ("code", "is no checkpoint of eefast train: it is damaged, or holds code"),
        ("another program's", "is no checkpoint of eefast train"),
        ("a list", "is no checkpoint of eefast train"),
        ("newer", "was written by a newer eefast; install that"),
        ("lacks a weight", "does not fit this run"),
        ("lacks the optimiser", "does not fit this run"),
        ("odd epochs", "is no checkpoint of eefast train"),
        ("odd loops", "does not fit this run"),
        ("odd callbacks", "does not fit this run"),
    ],
)
def test_a_checkpoint_that_cannot_be_resumed_is_named(
    finished: tuple[Path, dict], tmp_path: Path, kind: str, message: str
) -> None:
    folder, options = finished
    content = changed_file((folder / "last.ckpt").read_bytes(), kind, tmp_path)
    output = tmp_path / "run"
    output.mkdir()
    if content is None:
        (output / "last.ckpt").mkdir()
    else:
        (output / "last.ckpt").write_bytes(content)
    if "does not fit" in message:
        (output / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"last\.ckpt") as raised:
        train(output=output, resume=True, **options)
    text = str(raised.value)
    assert message in text
    assert "start again without --resume" in text
    assert "\n" not in text
    assert not (tmp_path / "executed").exists()
    if "does not fit" in message:
        (output / "best.ckpt").write_bytes(b"")
        with pytest.raises(ValueError, match=r"best\.ckpt is no intact checkpoint: it is empty; start again"):
            train(output=output, resume=True, **options)
        return
    assert [path.name for path in output.iterdir()] == ["last.ckpt"]
    # An intact one beside it is offered, and works.
    if kind in ("empty", "cut 0.5"):
        (output / "best.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
        with pytest.raises(ValueError, match=r"copy .*best\.ckpt, of epoch 1, over it"):
            train(output=output, resume=True, **options)
        (output / "last.ckpt").write_bytes((folder / "best.ckpt").read_bytes())
        train(output=output, resume=True, **options)
        same_run(folder, output)


def test_the_best_epoch_is_saved(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that breaks in the last epoch: the saved one is that of the best epoch, not of the last."""
    start = EarlyExitModule.on_train_epoch_start

    def breaking(module: EarlyExitModule) -> None:
        start(module)
        if module.current_epoch == 4:
            for head in module.net.heads:
                head.classifier.weight.data.mul_(-30)

    monkeypatch.setattr(EarlyExitModule, "on_train_epoch_start", breaking)
    options = {**RESUMABLE, "loss": "v0", "two_stage": 0, "schedule": "constant", "learning_rate": 0.01, "epochs": 5}
    report = train(data_root=small_mnist, output=tmp_path, optimizer="sgd", **options)
    rows = list(csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open()))
    by_epoch = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert len(by_epoch) == 5
    assert len([row for row in rows if row["loss"]]) == 5
    assert report.best_epoch == 1 + by_epoch.index(min(by_epoch)) < 5
    assert report.best_held_out_loss == pytest.approx(min(by_epoch))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == report.best_epoch - 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 4
    net = load(tmp_path)
    images, labels = datasets.dataset("mnist", small_mnist, "train")[:]
    _, kept = random_split(range(1500), [400, 1100], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net.all_exits(net.prepare(images[kept.indices]))
    held_out_loss = sum(torch.nn.functional.cross_entropy(out.logits, labels[kept.indices]) for out in outputs)
    assert held_out_loss.item() == pytest.approx(min(by_epoch), rel=1e-4)


def test_heads_learn_the_answers_of_a_frozen_backbone(colours: Path, tmp_path: Path) -> None:
    """PTEENet: the backbone alone (v6), then heads that agree with it, though every label is wrong."""
    options = {
        "dataset": "folder", "image_size": 16, "num_exits": 2, "placement": "linear", "held_out": 60, "batch_size": 16,
        "head": "bnpool", "max_accuracy_drop": 1.0, "device": "cpu",
    }  # fmt: skip
    first = train("eenet20", output=tmp_path / "right", data_root=colours, loss="pteenet_v6", epochs=4, **options)
    assert first.exit_accuracy[-1] > 0.9
    assert max(first.exit_agreement[:-1]) < 0.7

    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for name, other in (("blue", "green"), ("green", "red"), ("red", "blue")):
        (wrong / other).symlink_to(colours / "train" / name)
    second = train(
        "eenet20",
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


def test_mixed_precision_trains_in_bfloat16_and_saves_float32(colours: Path, tmp_path: Path) -> None:
    dtypes = set()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, received, returned: dtypes.add(returned.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    options = {"dataset": "folder", "image_size": 16, "held_out": 60, "batch_size": 16, "head": "conv1", "epochs": 3}
    try:
        report = train(
            "eenet20", data_root=colours, output=tmp_path, precision="bf16-mixed", loss="v0+v4", device="cpu", **options
        )
    finally:
        handle.remove()
    assert torch.bfloat16 in dtypes
    assert report.exit_accuracy[-1] > 0.6
    assert {value.dtype for value in load(tmp_path).state_dict().values()} == {torch.float32, torch.int64}


def test_tensorboard_is_optional(small_mnist: Path, tmp_path: Path) -> None:
    options = {**RESUMABLE, "epochs": 1, "two_stage": 0, "data_root": small_mnist, "output": tmp_path / "out"}
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        train(tensorboard=True, **options)
        assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents*"))
        return
    with pytest.raises(ImportError, match="tensorboard"):
        train(tensorboard=True, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("backbone", "exits"), [("torchvision:resnet18", ["layer1", "layer2"]), ("timm:resnet10t", ["layer1", "layer2.0"])]
)
def test_exits_attached_to_a_backbone(colours: Path, tmp_path: Path, backbone: str, exits: list[str]) -> None:
    torch.manual_seed(0)
    network = backbones.backbone(backbone, 3)
    torch.save(
        {"state_dict": {f"module.{name}": v for name, v in network.state_dict().items()}}, tmp_path / "weights.pth"
    )
    report = train(
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


def test_backbones_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'torchvision:resnet81' is unknown to torchvision; near are resnet18"):
        backbones.backbone("torchvision:resnet81", 10)
    with pytest.raises(ValueError, match="'timm:resnet10tt' is unknown to timm; near are resnet10t"):
        backbones.backbone("timm:resnet10tt", 10)
    with pytest.raises(ValueError, match="must be torchvision:NAME or timm:NAME"):
        backbones.backbone("resnet18", 10)
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        backbones.read_weights(tmp_path / "weights.pth")
    (tmp_path / "text.pth").write_text("weights")
    with pytest.raises(ValueError, match=r"no file of torch\.save"):
        backbones.read_weights(tmp_path / "text.pth")
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        backbones.read_weights(tmp_path / "other.pth")
    torch.save(torch.nn.Linear(3, 1).state_dict(), tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="do not fit the network"):
        backbones.load_weights(torch.nn.Linear(3, 2), tmp_path / "linear.pth")
    with pytest.raises(FileNotFoundError, match=r"has no attached\.json"):
        backbones.load_attached(tmp_path)


@pytest.mark.parametrize(("kind", "anew"), [("pool", []), ("conv2", [0, 1]), ("bnpool", [0, 1])])
def test_heads_of_another_kind_start_anew(tmp_path: Path, kind: str, anew: list[int]) -> None:
    made = [
        zoo.eenet("eenet8", 2, head=head, input_shape=(1, 12, 12)) for head in ("pool", kind)
    ]  # different weights: nothing seeds them
    made[0].save(tmp_path / "net")
    (there, before), network = (net.state_dict() for net in (made[0], copy.deepcopy(made[1]))), made[1]
    assert backbones.load_network(network, tmp_path / "net") == anew
    own = tuple(f"heads.{i}." for i in anew)
    for name, value in network.state_dict().items():
        assert torch.equal(value, (before if name.startswith(own) else there)[name]), name
    assert not torch.equal(before["heads.2.classifier.weight"], there["heads.2.classifier.weight"])

    # Nothing else may be missing or too many.
    for change in (lambda w: w.pop("heads.2.classifier.weight"), lambda w: w.update({"heads.7.x": torch.ones(1)})):
        weights = dict(there)
        change(weights)
        torch.save(weights, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match="do not fit the network"):
            backbones.load_network(network, tmp_path / "wrong.pth")


def command_line(*words: object) -> dict:
    """What `eefast train` hands to `train`."""
    seen: dict = {}

    def note(**arguments: object) -> None:
        seen.update(arguments)
        raise ArithmeticError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eefast.train.run.train", note)
        result = CliRunner().invoke(app, ["train", *map(str, words)])
    if not isinstance(result.exception, ArithmeticError):
        raise result.exception
    return seen


def test_options_and_their_other_names(tmp_path: Path) -> None:
    defaults = command_line()
    signature = inspect.signature(train).parameters
    own = ("output", "data_root")
    assert {k: v for k, v in defaults.items() if k not in own} == {
        name: list(p.default) if name == "exits" else p.default for name, p in signature.items() if name not in own
    }
    words = "--lr 0.1 --opt sgd --sched cosine -b 17 -j 2 --model eenet8 --data-dir D --epochs 3 --seed 5"
    found = command_line(*words.split(), "--exits", "layer1, layer2.0", "--no-flip")
    expected = {
        "learning_rate": 0.1, "optimizer": "sgd", "schedule": "cosine", "batch_size": 17, "workers": 2, "net": "eenet8",
        "data_root": Path("D"), "epochs": 3, "seed": 5, "exits": ["layer1", "layer2.0"], "flip": False,
    }  # fmt: skip
    assert found == {**defaults, **expected}
    assert command_line("--amp", "--device", "cpu")["precision"] == "bf16-mixed"
    assert command_line("--amp", "--device", "cuda")["precision"] == "16-mixed"


def test_options_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "lr: 1e-3\nbatch-size: 17\nplacement: [1, 4]\nflip: false\nseed: 3\ndownload: true\nexits: [a, b.c]\n"
    )
    expected = {
        "learning_rate": 1e-3, "batch_size": 17, "placement": [1, 4], "flip": False, "seed": 3, "download": True,
        "exits": ["a", "b.c"],
    }  # fmt: skip
    assert command_line("--config", file) == {**command_line(), **expected}
    found = command_line("--seed", 4, "--config", file, "--learning-rate", 0.5, "--flip")
    assert found == {**command_line(), **expected, "seed": 4, "learning_rate": 0.5, "flip": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "'epoch' is no option of train; near are epochs"),
        ("config: a.yaml", "'config' is no option of train"),
        ("lr: 1\nlearning_rate: 2", "'learning_rate' is given twice"),
        ("- epochs", "must hold lines such as"),
        ("epochs: [", "is not YAML"),
    ],
)
def test_options_from_a_malformed_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        command_line("--config", file)
    file.write_text("epochs: many")
    with pytest.raises(SystemExit):
        command_line("--config", file)


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
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; choose one of adamw, adam, sgd"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; choose one of one-cycle, cosine, step, constant"),
        ({"precision": "8"}, "precision='8' is unknown; choose one of 32-true, 16-mixed, bf16-mixed"),
        ({"two_stage": 12}, "two_stage=12 must lie in 0 … epochs - 1 = 11"),
        ({"devices": 0}, "devices=0 must be at least -1"),
        ({"self_labelled": True}, "self_labelled=True needs a frozen backbone"),
        ({"exits": ["layer1"]}, "give both, or none of them with net"),
        ({"image_size": 32}, "image_size=32: the images of mnist have one size"),
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
    images, labels = datasets.mnist_test()
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
