"""What training knew of its images is saved with a network, checked when it is loaded, and the default of commands."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import run
from idx_files import idx_bytes
from networks import lived_in, spread_thresholds
from PIL import Image
from reference_nets import EENet, save
from torch import nn
from torchvision.models._api import BUILTIN_MODELS

import eefast
from eefast import zoo
from eefast.data import datasets
from eefast.surgery import attach, backbone
from eefast.thresholds import calibration
from eefast.thresholds import outputs as outputs_module
from eefast.thresholds.outputs import collect
from eefast.train.options import TrainOptions
from eefast.train.run import train


def test_how_many_images_are_enough() -> None:
    assert [calibration.least_images(drop) for drop in (None, 0.05, 0.01, 0.005, 0.003, 0.001, 1e-9, 0.0)] == [
        100, 100, 100, 200, 334, 1000, 1000, 1000,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "mnist" and "fashion-mnist" of noise, and "net", whose record says the latter, seed 5, 31 of 70."""
    root = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    for name in ("mnist", "fashion-mnist"):
        (root / name).mkdir()
        for stem, count in (("train", 70), ("t10k", 17)):
            images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            labels = random.integers(0, 10, count, dtype=np.uint8)
            (root / name / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(images))
            (root / name / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    info = datasets.DATASETS["fashion-mnist"]
    net = lived_in(zoo.eenet("eenet8", input_shape=info.shape, normalization=(info.mean, info.std)), 1)
    whole = datasets.dataset("fashion-mnist", root / "fashion-mnist", "train")
    spread_thresholds(net, net.prepare(whole.images), 0.4)
    net.record = datasets.record("eenet8", 10, info.shape, "fashion-mnist", whole, 31, 5)
    net.save(root / "net")
    return root


def test_commands_take_what_training_had(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "net", tmp_path / "net")
    defaults = [tmp_path / "net", "--data-root", trained / "fashion-mnist", "--json", "-"]
    report = json.loads(
        run("calibrate", *defaults, "--max-cost", 0.7, "--few-images", "--no-assurance", "--save").stdout
    )
    assert (report["dataset"], report["held_out"], report["seed"]) == ("fashion-mnist", 31, 5)
    # The same as from images that are drawn here.
    net, whole = eefast.load(trained / "net"), datasets.dataset("fashion-mnist", trained / "fashion-mnist", "train")
    _, kept = torch.utils.data.random_split(range(70), [39, 31], generator=torch.Generator().manual_seed(5))
    outputs, labels = collect(net, [whole[kept.indices]])
    expected = calibration.calibrate(outputs, labels, net.cost, "learned", max_cost=0.7)
    assert report["chosen"]["learned"]["thresholds"] == list(expected.thresholds)
    saved = eefast.load(tmp_path / "net")
    assert saved.record == net.record
    assert saved.thresholds.tolist() == list(expected.thresholds)
    report = json.loads(run("evaluate", *defaults, "--engine", "reference").stdout)
    test = datasets.dataset("fashion-mnist", trained / "fashion-mnist", "test")
    assert report["dataset"] == "fashion-mnist"
    assert report["evaluation"]["accuracy"] == float((saved(test.images).labels == test.labels).double().mean())
    fewer = run("calibrate", *defaults, "--max-cost", 0.7, "--few-images", "--no-assurance", "--held-out", 7)
    assert json.loads(fewer.stdout)["held_out"] == 7


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate --dataset mnist", r"net was trained on fashion-mnist, and --dataset mnist is another data set"),
        ("calibrate --dataset mnist --save", "net was trained on fashion-mnist"),
        ("plot --dataset mnist", "net was trained on fashion-mnist"),
        ("bench --dataset mnist", "net was trained on fashion-mnist"),
        ("calibrate --seed 1 --save", "--seed 1: .*net was trained with 5, so images that it was trained on would be"),
        ("calibrate --held-out 32", "--held-out 32: .*net was trained with 31, so images that it was trained on"),
        ("plot --seed 6", "--seed 6: .*net was trained with 5"),
        ("bench --held-out 69", "--held-out 69: .*net was trained with 31"),
        (
            "calibrate",
            r"31 held-out images are too few: one of them is 0\.0323 .* 730 are needed .*; train with more",
        ),
        ("calibrate --max-accuracy-drop 0.05", "so 100 are needed for this budget"),
        (
            "calibrate --held-out 3 --max-cost 0.7",
            "3 held-out images are too few: .* so 100 are needed .*; use more with --held-out",
        ),
        ("plot", "31 held-out images are too few"),
        ("bench --batch-sizes 4", "31 held-out images are too few: .* so 200 are needed"),
        ("evaluate --dataset minst", "dataset='minst' is unknown"),
    ],
)
def test_what_training_did_not_have_is_refused(trained: Path, tmp_path: Path, words: str, message: str) -> None:
    before = {path.name: path.read_bytes() for path in (trained / "net").iterdir()}
    command, *more = words.split()
    place = {"plot": ["--output", tmp_path / "x.png"], "bench": ["--figure", tmp_path / "x.png"]}.get(command, [])
    with pytest.raises(ValueError, match=message):
        run(command, trained / "net", "--data-root", trained / "fashion-mnist", *more, *place)
    assert {path.name: path.read_bytes() for path in (trained / "net").iterdir()} == before
    assert not (tmp_path / "x.png").exists()


def test_other_images_under_the_same_name_are_refused(trained: Path, tmp_path: Path) -> None:
    words = ["calibrate", trained / "net", "--max-cost", 0.7, "--few-images", "--no-assurance", "--json", "-"]
    with pytest.raises(ValueError, match=r"the 70 training images of fashion-mnist in .*mnist are not the 70 that"):
        run(*words, "--data-root", trained / "mnist")
    for command in ("calibrate", "evaluate"):
        start = [command, trained / "net", "--dataset", "mnist", "--data-root", trained / "mnist", "--other-data"]
        done = run(*start, *words[2:] if command == "calibrate" else ["--engine", "reference", "--json", "-"])
        assert json.loads(done.stdout)["dataset"] == "mnist"
    done = run(*words, "--data-root", trained / "fashion-mnist", "--other-data", "--held-out", 40, "--seed", 6)
    assert [json.loads(done.stdout)[key] for key in ("held_out", "seed")] == [40, 6]
    done = run(*words, "--data-root", trained / "fashion-mnist", "--other-data")
    assert (
        "--other-data: the held-out images are the 14 that eefast train keeps aside by default with seed 1"
        in done.stderr
    )


def test_networks_without_a_record(trained: Path, tmp_path: Path) -> None:
    net = eefast.load(trained / "net")
    net.record = None
    net.save(tmp_path / "old")
    root = ["--data-root", trained / "fashion-mnist", "--json", "-"]
    done = run("evaluate", tmp_path / "old", *root, "--engine", "reference")
    assert json.loads(done.stdout)["dataset"] == "fashion-mnist"
    assert "old has no training.json; its normalisation is that of fashion-mnist, which is used" in done.stderr
    done = run("calibrate", tmp_path / "old", *root, "--max-cost", 0.7, "--few-images", "--no-assurance")
    assert "old has no training.json: the held-out images are the 14 that eefast train keeps aside" in done.stderr
    assert json.loads(done.stdout)["held_out"] == 14
    net.normalization = ((0.5,), (0.5,))
    net.save(tmp_path / "unknown")
    save(EENet(20, (2, 4), input_shape=(1, 28, 28)).state_dict(), tmp_path / "reference.pt")
    for name in ("unknown", "reference.pt"):
        for command in ("calibrate", "evaluate", "plot", "bench"):
            with pytest.raises(
                ValueError, match=r"does not say what it was trained on; name the data set with --dataset"
            ):
                run(command, tmp_path / name, *root[:2])


def write_classes(root: Path, names: str, count: int) -> Path:
    random = np.random.default_rng(1)
    for part in ("train", "val"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 256, (33, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


class Tiny(nn.Module):
    """Smaller than any network in torchvision."""

    def __init__(self, weights: None = None, num_classes: int = 1000) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.pool(self.second(self.first(x))), 1))


def test_thresholds_of_a_custom_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_classes(tmp_path / "ab", "ab", 6)
    torch.manual_seed(0)
    monkeypatch.setitem(BUILTIN_MODELS, "tiny", Tiny)
    name, exits = "torchvision:tiny", ["first"]
    info, whole = datasets.info("folder", root, 32), datasets.dataset("folder", root, "train", image_size=32)
    body = lived_in(backbone(name, 2), 0)
    net = attach(body, exits, input_shape=info.shape, normalization=(info.mean, info.std))
    net.record = datasets.record(name, 2, info.shape, "folder", whole, 5, 3)
    net.save(tmp_path / "net")
    found = eefast.load(tmp_path / "net")
    assert (found.record.classes, found.record.resize, found.name) == (("a", "b"), 37, name)

    words = [tmp_path / "net", "--few-images", "--max-cost", 0.9, "--criterion", "entropy", "--save", "--no-assurance"]
    done = run("calibrate", *words, "--data-root", root, "--scale", "--json", tmp_path / "report.json")
    assert f"{name} with 1 early exits, 5 held-out images of folder" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    again = eefast.load(tmp_path / "net")
    assert again.criterion.name == "entropy"
    assert again.thresholds.tolist() == report["chosen"]["entropy"]["thresholds"]
    assert (again.record, again.config) == (found.record, found.config)
    temperature = report["scaling"]["temperature"][0]
    torch.testing.assert_close(again.heads[0].classifier.weight * temperature, found.heads[0].classifier.weight)
    again.with_criterion("margin").save(tmp_path / "copy")
    assert eefast.load(tmp_path / "copy").criterion.name == "margin"
    written = sorted(path.name for path in (tmp_path / "copy").iterdir())
    assert written == ["config.json", "model.safetensors", "training.json"]

    # Folders of other classes, of which there are as many.
    other = write_classes(tmp_path / "ac", "ac", 6)
    for command, more in (("calibrate", words[1:4]), ("evaluate", ["--engine", "reference"])):
        with pytest.raises(ValueError, match=r"the classes in .*ac are not those .* differ in b, c; .*--other-data"):
            run(command, tmp_path / "net", *more, "--data-root", other)
    words = ["evaluate", tmp_path / "net", "--engine", "reference", "--json", "-", "--data-root"]
    assert json.loads(run(*words, other, "--other-data").stdout)["evaluation"]["images"] == 12
    # The training images are not needed to measure others, and none may come or go.
    shutil.rmtree(other / "train")
    (other / "val" / "c").rename(other / "val" / "b")
    done = run(*words[:4], "--data-root", other)
    assert re.search(r"^class +images .*\na +6 .*\nb +6 ", done.stdout, re.MULTILINE)
    (root / "train" / "b" / "0.png").rename(root / "train" / "a" / "new.png")
    with pytest.raises(ValueError, match=r"the 12 training images .* are not the 12 that"):
        run("calibrate", tmp_path / "net", "--few-images", "--data-root", root)


def test_saving_that_must_fail_fails_before_the_work(trained: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(outputs_module, "collect", lambda *a: pytest.fail("work was done"))
    monkeypatch.setattr(eefast.EarlyExitNet, "check_saving", lambda net: (_ for _ in ()).throw(ValueError("no saving")))
    words = ["--data-root", trained / "fashion-mnist", "--few-images", "--save"]
    with pytest.raises(ValueError, match="no saving"):
        run("calibrate", trained / "net", *words)
    with pytest.raises(ValueError, match="no saving"):
        run("bench", trained / "net", *words, "--figure", tmp_path / "x.png")


def test_a_run_goes_on_with_the_same_images_only(trained: Path, tmp_path: Path) -> None:
    for stem in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        shutil.copy(trained / "mnist" / f"train-{stem}", tmp_path)
    options = {
        "net": "eenet8", "num_exits": 2, "epochs": 1, "batch_size": 16, "device": "cpu",
        "data_root": tmp_path, "output": tmp_path / "out",
    }  # fmt: skip
    report = train(TrainOptions(**options))
    assert report.arguments["held_out"] == 14
    whole = datasets.dataset("mnist", tmp_path, "train")
    expected = datasets.record("eenet8", 10, (1, 28, 28), "mnist", whole, 14, 1)
    assert eefast.load(tmp_path / "out").record == expected
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(whole.labels.flip(0).numpy()))
    with pytest.raises(
        ValueError, match=r"last\.ckpt does not fit this run \(the training images have changed since\)"
    ):
        train(TrainOptions(**options, resume=True))
