"""`eefast predict`: the table, JSON, names of classes, images that cannot be read."""

import json
import sys
from pathlib import Path

import pytest
from command_line import run
from networks import lived_in
from pictures import photograph

import eefast
from eefast import zoo


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict")
    net = lived_in(zoo.eenet("eenet8", num_classes=3, input_shape=(1, 14, 14), normalization=((0.1,), (0.3,))), 2)
    net.save(folder / "plain")
    net.preprocessing, net.classes = eefast.Preprocessing(16), ("ant", "bee [red]", "c\n")
    net.save(folder / "net")
    for i in range(3):
        photograph(20 + i, 15, seed=i).save(folder / f"{i}.png")
    return folder


def test_the_table_and_the_figures_are_those_of_the_function(place: Path) -> None:
    files = [place / "1.png", place / "0.png"]
    expected = eefast.predict(place / "net", files, top=2)
    words = ("predict", place / "net", *files, "--top", 2)
    figures = json.loads(run(*words, "--json", "-").stdout)["images"]
    assert [(row["image"], row["label"], row["exit"], row["cost"]) for row in figures] == [
        (answer.image, answer.label, answer.exit, answer.cost) for answer in expected
    ]
    assert [[c["name"] for c in row["top"]] for row in figures] == [[c.name for c in a.top] for a in expected]
    table = run(*words).stdout
    for answer in expected:
        for candidate in answer.top:
            assert f"{candidate.probability:.2%}" in table
            assert candidate.name.replace("\n", "\\n") in table


def test_a_network_that_does_not_say_how(place: Path) -> None:
    with pytest.raises(ValueError, match="--crop-fraction"):
        run("predict", place / "plain", place / "0.png")
    words = ("--crop-fraction", 14 / 16, "--json", "-")
    told, own = (json.loads(run("predict", place / name, place / "0.png", *words).stdout) for name in ("plain", "net"))
    assert [row["label"] for row in told["images"]] == [row["label"] for row in own["images"]]
    assert told["images"][0]["name"] is None


def test_an_image_that_cannot_be_read_is_a_row_and_the_exit_code_says_so(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(RuntimeError, match="1 of 2 images could not be read"):
        run("predict", place / "net", place / "0.png", tmp_path, "--json", tmp_path / "found.json")
    whole, broken = json.loads((tmp_path / "found.json").read_text())["images"]
    assert whole["label"] is not None
    assert broken["label"] is None
    assert "it is empty" in broken["error"]


def test_without_pillow(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError):
        run("predict", place / "net", place / "0.png")
