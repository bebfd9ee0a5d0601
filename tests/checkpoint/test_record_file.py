"""Records of training ↔ training.json: saved with a network, and checked when it is loaded."""

import json
import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
from networks import lived_in

import eefast
from eefast import zoo
from eefast.checkpoint import RECORD_FILE
from eefast.data import mnist
from eefast.record import TrainingRecord

RECORD = TrainingRecord("eenet8", 10, (1, 12, 12), "fashion-mnist", None, None, 70, "0123456789abcdef", 31, 5)


def small(**options: object) -> eefast.EarlyExitNet:
    return lived_in(zoo.eenet("eenet8", input_shape=(1, 12, 12), **options), 1)


def test_the_record_goes_where_the_network_goes(tmp_path: Path) -> None:
    net = small()
    net.record = replace(RECORD, classes=("é", "a\nb", os.fsdecode(b"\xff"), *"cdefghi"))
    net.with_criterion("margin").save(tmp_path)
    loaded = eefast.load(tmp_path)
    assert loaded.record == net.record
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / RECORD_FILE).read_text() == (tmp_path / RECORD_FILE).read_text()
    # Another network's record would be a wrong one.
    small().save(tmp_path)
    assert eefast.load(tmp_path).record is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "config.json", "model.safetensors"]


@pytest.mark.parametrize(("length", "kept"), [(9, True), (200, False)])
def test_too_many_names_of_classes_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, kept: bool
) -> None:
    monkeypatch.setattr("eefast.checkpoint.record_file.MOST_BYTES", 800)
    net = small()
    net.record = replace(RECORD, classes=tuple(letter * length for letter in "abcdefghij"))
    net.save(tmp_path)
    assert eefast.load(tmp_path).record.classes == (net.record.classes if kept else None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 2}, "says format=2; it must be 1"),
        ({"format": True}, "says format=True; it must be 1"),
        ({"dataset": "../../etc"}, "it must be the name of a data set"),
        ({"dataset": ["mnist"]}, "it must be the name of a data set"),
        ({"seed": -1}, "says seed=-1; it must be a seed"),
        ({"seed": 1.0}, "it must be a seed"),
        ({"seed": 10**30}, "it must be a seed"),
        ({"held_out": 0}, "it must be a number of images"),
        ({"held_out": 71}, "says held_out=71, more than images=70"),
        ({"images": 10**300}, "it must be a number of images"),
        ({"classes": ["a", "a"]}, "it must be null or a list of different names"),
        ({"classes": ["a", 1]}, "it must be null or a list of different names"),
        ({"classes": ["a" * 256]}, "it must be null or a list of different names"),
        ({"classes": [str(i) for i in range(11)]}, "names 11 classes, the network has 10"),
        ({"classes": ["a"]}, "names 1 classes, the network has 10"),
        ({"fingerprint": "0123"}, "it must be 16 hexadecimal digits"),
        ({"resize": 0}, "it must be null or a number of pixels"),
        ({"input_shape": [1, 12]}, "it must be [channels, height, width]"),
        ({"network": "eenet20"}, "says network='eenet20', the network has 'eenet8'; delete it, or train again"),
        ({"num_classes": 9}, "says num_classes=9, the network has 10"),
        ({"input_shape": [1, 28, 28]}, "says input_shape=(1, 28, 28), the network has (1, 12, 12)"),
        ({"more": 1}, "has the unknown key 'more'"),
        ({"seed": None}, "it must be a seed"),
        ("[]", "holds no JSON object"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "is not JSON"),
        ("", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b" " * (5 << 20), "at most 4194304 are read"),
    ],
)
@pytest.mark.sampled(15)
def test_a_record_is_not_believed_blindly(tmp_path: Path, changed: dict | str | bytes, message: str) -> None:
    net = small()
    net.record = RECORD
    net.save(tmp_path)
    path = tmp_path / RECORD_FILE
    if isinstance(changed, dict):
        changed = json.dumps({**json.loads(path.read_text()), **changed})
    path.write_bytes(changed.encode() if isinstance(changed, str) else changed)
    with pytest.raises(eefast.checkpoint.loading.CheckpointError, match=re.escape(message)) as raised:
        eefast.load(tmp_path)
    assert RECORD_FILE in str(raised.value)
    assert "delete it" in str(raised.value)
    assert len(str(raised.value)) < 600
    path.unlink()
    assert eefast.load(tmp_path).record is None


def test_a_record_that_is_no_file_is_refused(tmp_path: Path) -> None:
    small().save(tmp_path)
    os.mkfifo(tmp_path / RECORD_FILE)
    with pytest.raises(eefast.checkpoint.loading.CheckpointError, match="only a regular file is read"):
        eefast.load(tmp_path)


def test_the_shipped_network_says_what_it_was_trained_on() -> None:
    net = eefast.load(resources.files("eefast") / "assets" / "eenet-mnist")
    assert (net.record.dataset, net.record.images, net.record.held_out, net.record.seed) == ("mnist", 60_000, 5_000, 1)
    assert mnist.PUBLISHED_LABELS[net.record.fingerprint] == "mnist"
