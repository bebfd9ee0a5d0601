"""The line of an epoch: figures in a fixed form, from one process only."""

from types import SimpleNamespace

import pytest
import torch

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


@pytest.mark.parametrize("within", [True, False])
def test_a_log_without_a_terminal_shows_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """At a clock on which a step takes twelve seconds."""
    now = [0.0]
    monkeypatch.setattr("eefast.train.progress.time.monotonic", lambda: now[0])
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=1, max_epochs=3, num_training_batches=7)
    lines = EpochLines(SimpleNamespace(seconds=[]), within)
    for step in range(7):
        now[0] += 12
        lines.on_train_batch_end(trainer, None, {"loss": torch.tensor(0.5 + step)}, None, step)
    shown = [f"epoch 2/3: step {n} of 7, loss {n - 0.5:.4f}" for n in (3, 6)] if within else []
    assert capsys.readouterr().err.splitlines() == shown
