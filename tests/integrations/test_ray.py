"""The class for `map_batches`, called as Ray calls it: read-only arrays, contents of files, other columns."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import lived_in
from pictures import photograph

import eefast
from eefast import zoo
from eefast.integrations.ray import Score

SHAPE = (3, 12, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net = lived_in(zoo.eenet("eenet8", num_classes=4, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    net.preprocessing = eefast.Preprocessing(14)
    net.save(tmp_path_factory.mktemp("net"))
    return Path(tmp_path_factory.getbasetemp() / "net0")


def test_pixels_and_files_give_the_networks_answers(folder: Path) -> None:
    files, expected = np.empty(5, object), []
    for i in range(5):
        content = BytesIO()
        photograph(14, 12 + i, seed=i).save(content, "PNG")
        files[i] = content.getvalue()
    score = Score(folder, "picture", keep_images=True)
    found = score({"picture": files, "key": np.arange(5)})
    assert found["picture"] is files
    assert found["key"].tolist() == [0, 1, 2, 3, 4]
    for i in range(5):
        (answer,) = eefast.predict(folder, photograph(14, 12 + i, seed=i))
        expected.append((answer.label, answer.exit, answer.cost))
    assert list(zip(found["label"], found["exit"], found["cost"], strict=True)) == expected
    pixels = np.random.default_rng(0).integers(0, 256, (7, *SHAPE), dtype=np.uint8)
    pixels.setflags(write=False)
    answer = eefast.accelerate(eefast.load(folder))(torch.from_numpy(pixels.copy()))
    again = Score(folder)({"image": pixels})
    assert again.keys() == {"label", "exit", "confidence", "cost"}
    assert again["label"].tolist() == answer.labels.tolist()
    assert again["confidence"].tolist() == answer.confidence.tolist()


def test_columns_of_the_data_set_are_not_replaced(folder: Path) -> None:
    pixels, score = np.zeros((2, *SHAPE), np.uint8), Score(folder)
    with pytest.raises(ValueError, match=r"a column 'label' already.*rename_columns\(\{'label': 'true_label', 'exit'"):
        score({"image": pixels, "exit": np.arange(2), "label": np.arange(2)})
    with pytest.raises(ValueError, match="a column 'cost' already"):
        Score(folder, "cost", keep_images=True)({"cost": pixels})
    assert Score(folder, "cost")({"cost": pixels}).keys() == {"label", "exit", "confidence", "cost"}


def test_pixels_in_a_column_of_objects_need_no_preprocessing(tmp_path: Path) -> None:
    net = lived_in(zoo.eenet("eenet8", num_classes=4, input_shape=SHAPE, normalization=((0.5,) * 3, (0.3,) * 3)), 1)
    net.save(tmp_path)
    pixels, objects = np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8), np.empty(3, object)
    objects[:] = list(pixels)
    score = Score(tmp_path)
    assert score({"image": objects})["label"].tolist() == score({"image": pixels})["label"].tolist()
    objects[1] = b"a file"
    with pytest.raises(ValueError, match="does not say how images are scaled and cropped"):
        score({"image": objects})


def test_what_is_wrong_is_named(folder: Path) -> None:
    score = Score(folder)
    with pytest.raises(ValueError, match="image_column='image' is none of the columns key"):
        score({"key": np.arange(5)})
    files = np.empty(1, object)
    files[0] = b"no image"
    with pytest.raises(ValueError, match="row 0 cannot be read as an image"):
        score({"image": files})
