"""The line of an epoch: figures in a fixed form, from one process only."""

from types import SimpleNamespace

import pytest

from eefast.train.progress import EpochLines


@pytest.mark.parametrize("first_process", [True, False])
def test_one_process_prints_the_figures_of_an_epoch(capsys: pytest.CaptureFixture[str], first_process: bool) -> None:
    metrics = {
        "loss": 0.12344, "held_out_loss": 2.0, "accuracy_exit_0": 0.5, "agreement_exit_0": 0.25,
        "accuracy_exit_1": 0.98765,
    }  # fmt: skip
    trainer = SimpleNamespace(is_global_zero=first_process, callback_metrics=metrics, current_epoch=2, max_epochs=12)
    EpochLines(SimpleNamespace(seconds=[99.0, 1.6])).on_train_epoch_end(trainer, None)
    line = "epoch 3/12: loss 0.1234, held-out loss 2.0000, accuracy % by exit 50.00 98.77, 2 s\n"
    assert capsys.readouterr() == ("", line if first_process else "")
