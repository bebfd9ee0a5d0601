"""What Lightning's loop keeps: the best epoch, float32 weights, curves."""

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.utils.data import random_split
from training_runs import RESUMABLE, trained

from eefast.checkpoint.loading import load
from eefast.data import datasets
from eefast.train.module import EarlyExitModule


def test_the_best_epoch_is_saved(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that breaks in the last epoch: the saved one is that of the best epoch, not of the last."""
    start = EarlyExitModule.on_train_epoch_start

    def breaking(module: EarlyExitModule) -> None:
        start(module)
        if module.current_epoch == 2:
            for head in module.net.heads:
                head.classifier.weight.data.mul_(-30)

    monkeypatch.setattr(EarlyExitModule, "on_train_epoch_start", breaking)
    options = {**RESUMABLE, "loss": "v0", "two_stage": 0, "schedule": "constant", "learning_rate": 0.01, "epochs": 3}
    report = trained(data_root=small_mnist, output=tmp_path, optimizer="sgd", **options)
    rows = list(csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open()))
    by_epoch = [float(row["held_out_loss"]) for row in rows if row["held_out_loss"]]
    assert len(by_epoch) == 3
    assert len([row for row in rows if row["loss"]]) == 3
    assert report.best_epoch == 1 + by_epoch.index(min(by_epoch)) < 3
    assert report.best_held_out_loss == pytest.approx(min(by_epoch))
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == report.best_epoch - 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2
    net = load(tmp_path)
    images, labels = datasets.dataset("mnist", small_mnist, "train")[:]
    _, kept = random_split(range(900), [192, 708], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = net.all_exits(net.prepare(images[kept.indices]))
    held_out_loss = sum(torch.nn.functional.cross_entropy(out.logits, labels[kept.indices]) for out in outputs)
    assert held_out_loss.item() == pytest.approx(min(by_epoch), rel=1e-4)


def test_mixed_precision_trains_in_bfloat16_and_saves_float32(colours: Path, tmp_path: Path) -> None:
    dtypes = set()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, received, returned: dtypes.add(returned.dtype) if isinstance(module, torch.nn.Conv2d) else None
    )
    options = {"dataset": "folder", "image_size": 8, "held_out": 60, "batch_size": 16, "head": "conv1", "epochs": 2}
    try:
        report = trained(
            net="eenet20",
            data_root=colours,
            output=tmp_path,
            precision="bf16-mixed",
            loss="v0+v4",
            device="cpu",
            **options,
        )
    finally:
        handle.remove()
    assert torch.bfloat16 in dtypes
    assert report.exit_accuracy[-1] > 0.6
    assert {value.dtype for value in load(tmp_path).state_dict().values()} == {torch.float32, torch.int64}


def test_tensorboard_is_optional(small_mnist: Path, tmp_path: Path) -> None:
    options = {**RESUMABLE, "epochs": 1, "two_stage": 0, "data_root": small_mnist, "output": tmp_path / "out"}
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        trained(tensorboard=True, **options)
        assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents*"))
        return
    with pytest.raises(ImportError, match="tensorboard"):
        trained(tensorboard=True, **options)
    assert not (tmp_path / "out").exists()
