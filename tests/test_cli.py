"""The command line of training: a folder that loads, data on stdout, errors in one line."""

import json
import subprocess
import sys

import torch
from test_data import idx_bytes

import eefast

COMMAND = [sys.executable, "-c", "from eefast.cli import main; main()"]


def eefast_command(*words):
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, text=True, check=False)


def test_train_writes_a_network_that_loads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (200,), generator=generator, dtype=torch.uint8)
    images = torch.randint(256, (200, 28, 28), generator=generator, dtype=torch.uint8)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(images.numpy()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels.numpy()))
    words = ["--net", "eenet20", "--placement", "1,4", "--epochs", 1, "--held-out", 40, "--batch-size", 32]
    done = eefast_command(
        "train", *words, "--data-root", tmp_path, "--output", tmp_path / "out", "--max-cost", 0.9, "--json", "-"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["held_out"]["learned"]["cost"] <= 0.9
    assert "epoch 1/1" in done.stderr
    net = eefast.load(tmp_path / "out")
    assert net.config["placement"] == [1, 4]
    assert net.thresholds.tolist() == torch.tensor(report["held_out"]["learned"]["thresholds"]).tolist()
    assert eefast.accelerate(net)(images.unsqueeze(1)).logits.shape == (200, 10)


def test_missing_data_says_how_to_get_it(tmp_path):
    done = eefast_command("train", "--data-root", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    words = " ".join(done.stderr.split())
    assert "does not exist" in words
    assert "--download" in words or "download=True" in words


def test_unknown_options_and_commands_exit_with_2():
    assert eefast_command("train", "--nett", "eenet20").returncode == 2
    assert eefast_command("fly").returncode == 2
    listing = eefast_command("--help")
    assert listing.returncode == 0
    assert "demo" in listing.stdout
    assert "train" in listing.stdout
