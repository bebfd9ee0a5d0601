"""What interrupts training: one line that says which epoch can be resumed."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from eefast.system.files import WriteError
from eefast.train.checkpoints import CheckpointWriter, RunRecord
from eefast.train.failures import explained
from eefast.train.module import DivergedError

FULL = "disk full"
RESUME = "--resume (resume=True) goes on after epoch"


def failing(error: BaseException, epochs: int = 0, started: bool = True, checkpoint: Path | None = None) -> str:
    """The text of what comes out, which must have the type of `error`; epochs: finished by this process."""
    record, writer = RunRecord({}, ""), CheckpointWriter()
    record.started, writer.epochs = started, epochs
    with pytest.raises(BaseException) as raised, explained(record, writer, checkpoint):  # noqa: PT011
        raise error
    assert type(raised.value) is type(error)
    return str(raised.value)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of the seventh epoch."""
    path = tmp_path / "last.ckpt"
    torch.save({"arguments": {}, "state_dict": {}, "seconds_per_epoch": [], "epoch": 6}, path)
    return path


@pytest.mark.parametrize(
    ("error", "first", "later"),
    [
        (KeyboardInterrupt(), "no epoch was finished", f"{RESUME} 2"),
        (WriteError(FULL), f"{FULL}; no epoch was finished", f"{FULL}; {RESUME} 2"),
        (DivergedError("NaN"), "NaN", "NaN; last.ckpt has epoch 2"),
        (RuntimeError("unreadable"), "unreadable; no epoch was finished", f"unreadable; {RESUME} 2"),
    ],
    ids=repr,
)
def test_what_can_be_resumed_is_said(error: BaseException, first: str, later: str) -> None:
    assert failing(error) == first
    assert failing(error, epochs=2) == later


def test_the_epochs_of_an_earlier_run_count(checkpoint: Path) -> None:
    assert failing(KeyboardInterrupt(), checkpoint=checkpoint) == f"{RESUME} 7"
    assert failing(KeyboardInterrupt(), epochs=9, checkpoint=checkpoint) == f"{RESUME} 9"


def test_an_unreadable_image_ends_as_a_runtime_error() -> None:
    record = RunRecord({}, "")
    record.started = True
    with pytest.raises(RuntimeError, match="gone; no epoch was finished"), explained(record, CheckpointWriter(), None):
        raise OSError("gone")


@pytest.mark.parametrize("ctrl_c", [True, False])
def test_lightning_s_exit_after_ctrl_c_is_ctrl_c_again(ctrl_c: bool) -> None:
    """That after SIGTERM stays."""

    def exits() -> None:
        try:
            raise KeyboardInterrupt if ctrl_c else RuntimeError
        except (KeyboardInterrupt, RuntimeError):
            raise SystemExit(1)  # noqa: B904  as Lightning does

    with pytest.raises(KeyboardInterrupt if ctrl_c else SystemExit) as raised:  # noqa: SIM117
        with explained(RunRecord({}, ""), CheckpointWriter(), None):
            exits()
    assert str(raised.value) == ("no epoch was finished" if ctrl_c else "1")


def test_options_that_lightning_refuses_are_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^no such device$"), explained(RunRecord({}, ""), CheckpointWriter(), None):
        raise MisconfigurationException("no such device")


def test_a_checkpoint_that_does_not_fit_is_a_value_error(checkpoint: Path) -> None:
    """Until training starts; later errors are others."""
    message = r"resume=True: .*last\.ckpt does not fit this run \('a weight'\); start again without --resume"
    with pytest.raises(ValueError, match=message), explained(RunRecord({}, ""), CheckpointWriter(), checkpoint):
        raise KeyError("a weight")
    assert failing(KeyError("a weight"), checkpoint=checkpoint) == "'a weight'"


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ValueError("a bug")], ids=repr)
def test_other_errors_stay(error: Exception) -> None:
    assert failing(error, epochs=2) == "a bug"


def test_before_training_starts_nothing_can_be_resumed() -> None:
    assert failing(RuntimeError("no GPU"), started=False) == "no GPU"
