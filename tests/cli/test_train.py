"""Words of `eefast train`, and the lines of its --config file → the options that `train` gets."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import run
from idx_files import idx_bytes
from typer.testing import CliRunner

import eefast
from eefast.cli.commands import app
from eefast.data import datasets, image_sets
from eefast.record import TrainingRecord
from eefast.train.options import TrainOptions


def command_line(*words: object) -> dict:
    """The options that `eefast train` gives to `train`."""
    seen: dict = {}

    def note(options: TrainOptions) -> None:
        seen.update(vars(options))
        raise ArithmeticError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eefast.train.run.train", note)
        result = CliRunner().invoke(app, ["train", *map(str, words)])
    if not isinstance(result.exception, ArithmeticError):
        raise result.exception
    return seen


def test_options_and_their_other_names(tmp_path: Path) -> None:
    defaults = command_line()
    assert defaults == {**vars(TrainOptions(exits=[])), "data_root": Path("data"), "output": Path("runs/trained")}
    words = "--lr 0.1 --opt sgd --sched cosine -b 17 -j 2 --model eenet8 --data-dir D --epochs 3 --seed 5"
    found = command_line(*words.split(), "--backbone", "timm:x", "--exits", "layer1, layer2.0", "--no-flip")
    expected = {
        "learning_rate": 0.1, "optimizer": "sgd", "schedule": "cosine", "batch_size": 17, "workers": 2, "net": "eenet8",
        "data_root": Path("D"), "epochs": 3, "seed": 5, "backbone": "timm:x", "exits": ["layer1", "layer2.0"],
        "flip": False,
    }  # fmt: skip
    assert found == {**defaults, **expected}
    assert command_line("--amp", "--device", "cpu")["precision"] == "bf16-mixed"
    assert command_line("--amp", "--device", "cuda")["precision"] == "16-mixed"


def test_options_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(
        "lr: 1e-3\nbatch-size: 17\nplacement: [1, 4]\nhead: [conv1, pool]\nflip: false\nseed: 3\ndownload: true\n"
        "backbone: timm:x\nexits: [a, b.c]\n"
    )
    expected = {
        "learning_rate": 1e-3, "batch_size": 17, "placement": [1, 4], "head": ["conv1", "pool"], "flip": False,
        "seed": 3, "download": True, "backbone": "timm:x", "exits": ["a", "b.c"],
    }  # fmt: skip
    assert command_line("--config", file) == {**command_line(), **expected}
    found = command_line("--seed", 4, "--config", file, "--learning-rate", 0.5, "--flip")
    assert found == {**command_line(), **expected, "seed": 4, "learning_rate": 0.5, "flip": True}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "'epoch' is no option of train; similar ones are epochs"),
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


def test_train_writes_a_network_that_loads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (200,), generator=generator, dtype=torch.uint8)
    images = torch.randint(256, (200, 28, 28), generator=generator, dtype=torch.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images.numpy()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels.numpy()))
    words = ["--net", "eenet20", "--placement", "1,4", "--epochs", 1, "--batch-size", 32]
    done = run("train", *words, "--data-root", tmp_path, "--output", tmp_path / "out", "--max-cost", 0.9, "--json", "-")
    report = json.loads(done.stdout)
    assert report["held_out"]["learned"]["cost"] <= 0.9
    assert "epoch 1/1" in done.stderr
    assert "40 of 200 training images, a fifth, are held out for choosing thresholds" in done.stderr
    assert (
        "held_out=40 images are few for choosing thresholds: each is 0.0250 of their accuracy; hold out 100 or more"
        in done.stderr
    )
    assert report["arguments"]["held_out"] == 40
    net = eefast.load(tmp_path / "out")
    trained_on = image_sets.fingerprint(datasets.dataset("mnist", tmp_path, "train"))
    shape = (1, 28, 28)
    assert net.record == TrainingRecord("eenet20", 10, shape, "mnist", None, None, 200, trained_on, 40, 1)
    assert net.config["placement"] == [1, 4]
    assert net.thresholds.tolist() == torch.tensor(report["held_out"]["learned"]["thresholds"]).tolist()
    assert eefast.accelerate(net)(images.unsqueeze(1)).logits.shape == (200, 10)


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist; download=True \(--download\)"):
        run("train", "--data-root", tmp_path / "nowhere")
