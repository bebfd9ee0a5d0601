"""The output folder before training starts: made, checked, cleared of what a killed run left, and recorded."""

import json
from pathlib import Path

import pytest

from eefast.train.folder import begin
from eefast.train.options import TrainOptions


def test_the_folder_is_made_and_says_what_runs_there(tmp_path: Path) -> None:
    options = TrainOptions(seed=7)
    begin(tmp_path / "new" / "run", options)
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["started.json"]
    assert json.loads((tmp_path / "new" / "run" / "started.json").read_text()) == {"arguments": options.record()}


def test_half_written_files_of_a_run_go_and_whole_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    whole = ["last.ckpt", "model.safetensors", "notes.txt", "notes.txt.0123abcd.partial"]
    half = [
        f"{name}.0123abcd.partial"
        for name in ("best.ckpt", "last.ckpt", "started.json", "model.safetensors", "config.json", "training.json",
                     "thresholds.json", "report.json", "logs/version_0/metrics.csv")
    ]  # fmt: skip
    for name in (*whole, *half):
        (tmp_path / name).touch()
    begin(tmp_path, TrainOptions())
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*whole, "started.json"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/run", r"output='.*file/run' cannot be made: Not a directory; name another folder"),
        ("file", r"output='.*file' cannot be made: File exists; name another folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match=message):
        begin(tmp_path / place, TrainOptions())
    assert (tmp_path / "file").read_text() == "text"


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").mkdir()
    with pytest.raises(ValueError, match=r"last\.ckpt cannot be written: it is a folder"):
        begin(tmp_path, TrainOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
