"""Checkpoints of a run: read whole and without running code, written whole, found again after a move."""

import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kill_and_resume import same_run
from training_runs import RESUMABLE, trained

from eefast.train.checkpoints import CheckpointWriter, RunRecord, best_and_last, first_line, read_checkpoint
from eefast.train.module import EarlyExitModule

INTACT = {"arguments": {"seed": 1}, "state_dict": {"w": torch.ones(3)}, "seconds_per_epoch": [1.5], "epoch": 4}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "last.ckpt"


def test_what_is_written_is_read(path: Path) -> None:
    CheckpointWriter().save_checkpoint(INTACT, path)
    found = read_checkpoint(path)
    assert torch.equal(found.pop("state_dict")["w"], torch.ones(3))
    # Files of the first versions say no format.
    assert found == {"arguments": {"seed": 1}, "seconds_per_epoch": [1.5], "epoch": 4, "format": 1}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("epoch", None),
        ("epoch", "4"),
        ("arguments", []),
        ("state_dict", 3),
        ("seconds_per_epoch", 1.5),
        ("format", "1"),
    ],
)
def test_other_contents_are_refused(path: Path, part: str, value: object) -> None:
    torch.save({**INTACT, part: value}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt is no checkpoint of eefast train$"):
        read_checkpoint(path)


def test_a_missing_file_is_gone(path: Path) -> None:
    with pytest.raises(ValueError, match=r"last\.ckpt is no intact checkpoint: it is gone$"):
        read_checkpoint(path)


def test_a_compressed_archive_is_refused(path: Path, tmp_path: Path) -> None:
    """PyTorch writes none; one of a few bytes may hold any number of gigabytes."""
    torch.save(INTACT, tmp_path / "stored")
    with zipfile.ZipFile(tmp_path / "stored") as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(ValueError, match="its check sums are wrong"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (ValueError(" two\nlines"), "two"),
        (KeyError(), "KeyError"),
    ],
    ids=repr,
)
def test_errors_are_told_in_one_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(("name", "epochs"), [("last.ckpt", 5), ("best.ckpt", 0)])
def test_finished_epochs_are_counted_by_the_last_checkpoint(tmp_path: Path, name: str, epochs: int) -> None:
    writer = CheckpointWriter()
    writer.save_checkpoint(INTACT, tmp_path / name)
    assert writer.epochs == epochs


def test_a_run_s_record_goes_into_its_checkpoints_and_comes_back() -> None:
    record, saved = RunRecord({"seed": 1}, "0123", "4567"), {}
    record.seconds = [2.5]
    record.on_save_checkpoint(None, None, saved)
    assert saved == {
        "format": 1, "arguments": {"seed": 1}, "seconds_per_epoch": [2.5], "images": "0123", "teacher": "4567",
    }  # fmt: skip
    record.seconds.append(3.5)
    assert saved["seconds_per_epoch"] == [2.5]
    again = RunRecord({"seed": 1}, "0123", "4567")
    again.on_load_checkpoint(None, None, saved)
    assert again.seconds == [2.5]
    assert not again.started
    again.on_train_start(None, None)
    assert again.started


def test_seconds_are_those_of_the_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("eefast.train.checkpoints.time", SimpleNamespace(perf_counter=lambda: next(now)))
    record = RunRecord({}, "")
    for _ in range(2):
        record.on_train_epoch_start(None, None)
        record.on_train_epoch_end(None, None)
    assert record.seconds == [2.5, 1.0]


def test_other_images_are_refused() -> None:
    """Among those held out could be some that it was trained on; the first versions recorded no images."""
    with pytest.raises(ValueError, match="the training images have changed since"):
        RunRecord({}, "0123").on_load_checkpoint(None, None, {"images": "4567", "seconds_per_epoch": []})
    RunRecord({}, "0123").on_load_checkpoint(None, None, {"seconds_per_epoch": []})


@pytest.mark.parametrize(("now", "before"), [("0123", "4567"), ("", "4567"), ("0123", "")])
def test_another_teacher_is_refused(now: str, before: str) -> None:
    checkpoint = {"images": "89ab", "seconds_per_epoch": []}
    with pytest.raises(ValueError, match="the teacher's weights have changed since"):
        RunRecord({}, "89ab", now).on_load_checkpoint(None, None, {**checkpoint, "teacher": before})
    RunRecord({}, "89ab", now).on_load_checkpoint(None, None, checkpoint)  # of a version that did not record it


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
    trained(output=tmp_path / "whole", **options)
    stop = 2
    with pytest.raises(ArithmeticError):
        trained(output=tmp_path / "before", **options)
    (tmp_path / "before").rename(tmp_path / "after")
    stop = None
    report = trained(output=tmp_path / "after", resume=True, **options)
    assert report.best_epoch == 1
    same_run(tmp_path / "whole", tmp_path / "after")
    assert not (tmp_path / "before").exists()


def test_paths_in_a_checkpoint_are_those_of_the_folder_that_it_is_in(tmp_path: Path) -> None:
    best, _ = best_and_last(tmp_path)
    state = {
        **best.state_dict(), "dirpath": "/gone", "best_model_path": "/gone/best.ckpt", "kth_best_model_path": "",
        "last_model_path": "/gone/last.ckpt", "best_k_models": {"/gone/best.ckpt": torch.tensor(0.5)},
    }  # fmt: skip
    best.load_state_dict(state)
    assert (best.best_model_path, best.last_model_path) == (str(tmp_path / "best.ckpt"), str(tmp_path / "last.ckpt"))
    assert (best.kth_best_model_path, list(best.best_k_models)) == ("", [str(tmp_path / "best.ckpt")])
    assert best.dirpath == str(tmp_path)
