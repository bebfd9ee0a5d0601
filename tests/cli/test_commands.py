"""The command line: folders that load, data on stdout, errors in one line."""

import json
import subprocess
import sys

import pytest
import torch
from command_line import held_out_of, run
from idx_files import idx_bytes
from networks import one_by_one
from reference_nets import EENet, answers, save, trained
from typer.testing import CliRunner

import eefast
from eefast.cli.commands import app
from eefast.data import datasets, image_sets
from eefast.record import TrainingRecord


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


def test_unknown_options_and_commands_exit_with_2():
    done = subprocess.run([sys.executable, "-m", "eefast", "fly"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "No such command 'fly'" in done.stderr
    assert CliRunner().invoke(app, ["train", "--nett", "eenet20"]).exit_code == 2
    listing = CliRunner().invoke(app, ["--help"])
    assert listing.exit_code == 0
    for command in ("demo", "train", "calibrate", "evaluate", "bench", "plot", "calibrate-device", "env"):
        assert f" {command} " in listing.stdout


def test_calibrate_saves_what_it_says(shop, tmp_path):
    net = eefast.load(shop / "net")
    net.save(tmp_path / "net")
    words = [
        "calibrate",
        tmp_path / "net",
        "--data-root",
        shop,
        "--held-out",
        31,
        "--few-images",
        "--seed",
        5,
        "--max-cost",
        0.7,
    ]
    cache = tmp_path / "held.safetensors"
    done = run(*words, "--criterion", "all", "--save", "--cache", cache, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["chosen"]) == set(eefast.criteria.CRITERIA)
    images, labels = held_out_of(shop, 31, 5)
    thresholds = json.loads((tmp_path / "net" / "thresholds.json").read_text())
    loaded = eefast.load(tmp_path / "net")
    assert loaded.thresholds.tolist() == report["chosen"]["learned"]["thresholds"]
    for name, chosen in report["chosen"].items():
        assert thresholds[name] == chosen["thresholds"]
        assert f"{chosen['accuracy']:.2%}" in done.stdout
        answer = one_by_one(net.with_criterion(name, thresholds[name]), net.prepare(images))
        assert chosen["cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
        assert chosen["cost"] <= 0.7
        assert chosen["accuracy"] == pytest.approx(float((answer.labels == labels).float().mean()))
        assert chosen["exits"] == answer.exit_index.bincount(minlength=3).tolist()
    # The cache stands for the images, and for no others.
    again = run(*words, "--criterion", "all", "--cache", cache, "--data-root", tmp_path / "gone", "--json", "-")
    assert json.loads(again.stdout)["chosen"] == report["chosen"]
    with pytest.raises(ValueError, match="was collected with images=31 of mnist by seed 5, not 31 of mnist by seed 6"):
        run(*words, "--seed", 6, "--cache", cache)


def test_calibrate_takes_half_a_point_off_the_final_exit_by_default(shop):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images", "--json", "-"]
    report = json.loads(run(*words).stdout)
    assert report["bound"] == {"max_accuracy_drop": 0.005}
    assert list(report["chosen"]) == ["learned"]
    assert report["chosen"]["learned"]["accuracy"] >= report["exits"][-1]["accuracy"] - 0.005
    assert report["scaling"] is None
    report = json.loads(run(*words, "--min-accuracy", 0, "--criterion", "margin").stdout)
    assert report["chosen"]["margin"]["cost"] == pytest.approx(float(eefast.load(shop / "net").cost[0]))


def test_calibrate_scales_what_it_saves(shop, tmp_path):
    eefast.load(shop / "net").save(tmp_path / "net")
    words = ["--data-root", shop, "--held-out", 31, "--few-images", "--max-cost", 0.7, "--criterion", "entropy"]
    done = run("calibrate", tmp_path / "net", *words, "--scale", "--save", "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = eefast.load(shop / "net"), eefast.load(tmp_path / "net")
    assert after.criterion.name == "entropy"
    assert "temperature" in done.stdout
    for one, two, t in zip(before.heads, after.heads, report["scaling"]["temperature"], strict=True):
        torch.testing.assert_close(one.classifier.weight / t, two.classifier.weight)
    images, labels = held_out_of(shop, 31, 1)
    answer = one_by_one(after, after.prepare(images))
    assert report["chosen"]["entropy"]["cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    assert report["chosen"]["entropy"]["accuracy"] == pytest.approx(float((answer.labels == labels).float().mean()))
    assert report["exits"] != report["exits_before_scaling"]


def test_calibrate_refuses_before_it_works(shop, tmp_path):
    words = ["calibrate", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    with pytest.raises(ValueError, match=r"learned: min_accuracy=1\.0 cannot be kept; the nearest is accuracy"):
        run(*words, "--min-accuracy", 1)
    with pytest.raises(ValueError, match=r"min_accuracy=0.5, max_cost=0.5: give one of them"):
        run(*words, "--min-accuracy", 0.5, "--max-cost", 0.5)
    with pytest.raises(ValueError, match=r"max_cost=1.5 must lie in 0 … 1"):
        run(*words, "--max-cost", 1.5)
    with pytest.raises(ValueError, match=r"criterion='best' is unknown"):
        run(*words, "--criterion", "best")
    with pytest.raises(ValueError, match=r"held_out=99 must lie in 1 … 70"):
        run(*words, "--held-out", 99)
    for command in ("calibrate", "evaluate", "plot"):
        with pytest.raises(FileNotFoundError, match=r"does not exist; download=True \(--download\)"):
            run(command, shop / "net", "--data-root", tmp_path / "gone")
        assert "--download" in run(command, "--help").stdout
    with pytest.raises(ValueError, match="is a file"):
        run("calibrate", shop / "train-labels-idx1-ubyte", "--save")
    with pytest.raises(ValueError, match="cifar10 has 3 channels and 10 classes; name with --dataset what"):
        run("evaluate", shop / "net", "--dataset", "cifar10")


def test_evaluate_agrees_with_one_by_one(shop):
    net = eefast.load(shop / "net")
    report = json.loads(run("evaluate", shop / "net", "--data-root", shop, "--batch-size", 9, "--json", "-").stdout)
    test = datasets.dataset("mnist", shop, "test")
    answer = one_by_one(net, net.prepare(test.images))
    found = report["evaluation"]
    assert found["images"] == 41
    assert found["accuracy"] == pytest.approx(float((answer.labels == test.labels).float().mean()))
    assert found["mean_cost"] == pytest.approx(float(answer.cost.mean()), abs=1e-6)
    exits = [r + w for r, w in zip(found["right"], found["wrong"], strict=True)]
    assert exits == answer.exit_index.bincount(minlength=3).tolist()
    assert report["flips"] == {"count": 0, "distance": 0.0}
    assert found["class_accuracy"][9] is None
    done = run("evaluate", shop / "net", "--data-root", shop, "--engine", "reference", "--images", 7)
    assert "7 images of mnist" in " ".join(done.stdout.split())
    assert "engine reference" in done.stdout


def test_evaluate_takes_the_shipped_images_without_a_folder(shop):
    report = json.loads(run("evaluate", shop / "net", "--images", 3, "--json", "-").stdout)
    assert report["evaluation"]["images"] == 3


def test_evaluate_takes_a_checkpoint_of_the_reference(shop, tmp_path):
    test = datasets.dataset("mnist", shop, "test")
    x = (test.images.float() / 255 - 0.1307) / 0.3081
    model = trained(EENet(20, (2, 4), input_shape=(1, 28, 28)), x)
    save(model.state_dict(), tmp_path / "model.pt")
    exits = answers(model, x)[1]
    report = json.loads(
        run("evaluate", tmp_path / "model.pt", "--dataset", "mnist", "--data-root", shop, "--json", "-").stdout
    )["evaluation"]
    assert [r + w for r, w in zip(report["right"], report["wrong"], strict=True)] == exits.bincount(
        minlength=3
    ).tolist()


def test_plot_draws_a_picture(shop, tmp_path):
    words = ["plot", shop / "net", "--data-root", shop, "--held-out", 31, "--few-images"]
    done = run(*words, "--twin", "ResNet-8=0.98,0.6", "--twin", "a=b=0.5", "--output", tmp_path / "one.png")
    assert "one.png" in done.stdout
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes((shop / "t10k-images-idx3-ubyte").read_bytes())
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes((shop / "t10k-labels-idx1-ubyte").read_bytes())
    run("plot", shop / "net", "--data-root", tmp_path, "--same-images", "--output", tmp_path / "two.png")
    for name in ("one.png", "two.png"):
        assert (tmp_path / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for twin in ("ResNet-8", "=0.9", "a=98", "a=0.9,x", "a=0.9,-1"):
        with pytest.raises(ValueError, match=r"must be name=accuracy\[,cost\]"):
            run(*words, "--twin", twin)
    with pytest.raises(ValueError, match="there is no folder"):
        run(*words, "--output", tmp_path / "no" / "folder.png")
