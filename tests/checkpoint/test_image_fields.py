"""What a folder says of image files and classes comes back; old folders are read; wrong values are one clear error."""

import json
from pathlib import Path

import pytest
import torch

import eefast
from eefast import zoo
from eefast.checkpoint.loading import CheckpointError, load
from eefast.preprocessing import Preprocessing
from eefast.record import TrainingRecord

SHAPE = (3, 9, 7)
CLASSES = ("cat", "Äpfel", "9")


def made() -> eefast.EarlyExitNet:
    return zoo.eenet("eenet8", num_classes=3, input_shape=SHAPE).eval()


def record(resize: int | None) -> TrainingRecord:
    return TrainingRecord("eenet8", 3, SHAPE, "folder", CLASSES, resize, 99, "0123456789abcdef", 9, 1)


@pytest.mark.parametrize("how", [Preprocessing(7), Preprocessing(11, "bicubic")])
def test_what_is_saved_comes_back(tmp_path: Path, how: Preprocessing) -> None:
    net = made()
    net.preprocessing, net.classes = how, CLASSES
    net.save(tmp_path)
    found = load(tmp_path)
    assert (found.preprocessing, found.classes) == (how, CLASSES)
    found.with_criterion("entropy").save(tmp_path)
    again = load(tmp_path)
    assert (again.preprocessing, again.classes) == (how, CLASSES)


def test_a_quantised_network_keeps_them(tmp_path: Path) -> None:
    net = made()
    net.preprocessing, net.classes = Preprocessing(8), CLASSES
    eefast.quantize(net, torch.randn(16, *SHAPE)).save(tmp_path)
    found = load(tmp_path)
    assert (found.preprocessing, found.classes) == (net.preprocessing, CLASSES)


def test_a_network_that_says_nothing_is_saved_as_before(tmp_path: Path) -> None:
    made().save(tmp_path)
    assert not {"preprocessing", "classes"} & json.loads((tmp_path / "config.json").read_text()).keys()
    assert load(tmp_path).preprocessing is load(tmp_path).classes is None


@pytest.mark.parametrize(("resize", "expected"), [(12, 12), (None, 7)])
def test_an_old_folder_has_what_its_training_recorded(tmp_path: Path, resize: int | None, expected: int) -> None:
    net = made()
    net.record = record(resize)
    net.save(tmp_path)
    assert "preprocessing" not in json.loads((tmp_path / "config.json").read_text())
    found = load(tmp_path)
    assert found.preprocessing == Preprocessing(expected)
    assert found.classes == CLASSES


WRONG = {
    "preprocessing": [
        None, 8, [], {}, {"resize": 8}, {"resize": 8, "interpolation": "nearest"},
        {"resize": 0, "interpolation": "bilinear"},
        {"resize": True, "interpolation": "bilinear"}, {"resize": 6, "interpolation": "bilinear"},
        {"resize": 8, "interpolation": "bilinear", "more": 1}, {"resize": 8, "interpolation": []},
    ],
    "classes": [None, "abc", [], ["a", "b"], ["a", "b", "b"], ["a", "b", ""], ["a", "b", 3], ["a", "b", "c" * 256]],
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_value_is_one_clear_error(tmp_path: Path, key: str, value: object) -> None:
    made().save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("how", "classes", "message"),
    [
        (None, ("a", "b"), "the network names 2 classes, but has 3"),
        (None, ("a", "b", "b"), "a list of different names"),
        (Preprocessing(6), None, "resize=6, less than the network's images have: 7"),
    ],
)
def test_saving_refuses_what_could_not_be_loaded(
    tmp_path: Path, how: Preprocessing | None, classes: tuple[str, ...] | None, message: str
) -> None:
    net = made()
    net.preprocessing, net.classes = how, classes
    with pytest.raises(ValueError, match=message):
        net.save(tmp_path / "new")


def test_names_that_fill_a_megabyte_are_left_out(tmp_path: Path) -> None:
    net = zoo.eenet("eenet8", num_classes=5000, input_shape=SHAPE)
    net.classes = tuple(f"{i:0250}" for i in range(5000))
    net.save(tmp_path)
    assert load(tmp_path).classes is None
