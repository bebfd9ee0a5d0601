"""Options that cannot be: refused by name; what is recorded of them, and what may differ when a run is resumed."""

import json
import math
import re
from pathlib import Path

import pytest

from eefast.train.options import FREE_TO_CHANGE, TrainOptions


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"batch_size": 1}, "batch_size=1 must be at least 2"),
        ({"held_out": 0}, "held_out=0 must be at least 1"),
        ({"loss": "v7"}, "loss='v7'"),
        ({"crop_fraction": 1.0}, "crop_fraction=1.0: images of mnist are not cropped; leave it out"),
        ({"crop_fraction": 1.1, "dataset": "folder"}, "crop_fraction=1.1 must be above 0 and at most 1"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop=-0.1 must be in 0 … 1"),
        ({"optimizer": "lion"}, "optimizer='lion' is unknown; choose one of adamw, adam, sgd"),
        ({"schedule": "linear"}, "schedule='linear' is unknown; choose one of one-cycle, cosine, step, constant"),
        ({"precision": "8"}, "precision='8' is unknown; choose one of 32-true, 16-mixed, bf16-mixed"),
        ({"two_stage": 12}, "two_stage=12 must be in 0 … epochs - 1 = 11"),
        ({"devices": 0}, "devices=0 must be at least -1 and not 0"),
        ({"nodes": 0}, "nodes=0 must be at least 1"),
        ({"self_labelled": True}, "self_labelled=True needs a frozen backbone"),
        ({"freeze_backbone": True}, "freeze_backbone=True keeps random weights, from which early exits learn little"),
        (
            {"freeze_backbone": True, "weights": "w.pth", "loss": "pteenet_v6"},
            "loss='pteenet_v6' trains the final exit alone, which freeze_backbone=True keeps",
        ),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0 and finite"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be above 0 and finite"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be at least 0 and finite"),
        ({"cost_weight": math.nan}, "cost_weight=nan must be finite"),
        ({"shift": -1}, "shift=-1 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be in 0 … 4294967295"),
        ({"seed": 2**32}, "seed=4294967296 must be in 0 … 4294967295"),
        ({"loss": "taught"}, "teacher=None, loss='taught': a teacher and a loss with a term taught need each other"),
        ({"teacher": "runs/t"}, "teacher='runs/t', loss='deep_supervision+correctness': a teacher and a loss with"),
        ({"exits": ["layer1"]}, "backbone=None, exits=['layer1']: give both, or none of them with net"),
        ({"backbone": "timm:x"}, "backbone='timm:x', exits=[]: give both, or none of them with net"),
    ],
)
def test_impossible_values_are_named(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainOptions(**changed)


def test_the_record_is_json_and_names_no_folder() -> None:
    options = TrainOptions(
        data_root="/secret/data", output="/secret/out", weights=Path("/secret/w.pth"), placement=(1, 4),
        backbone="timm:x", exits=("a", "b"), teacher="/secret/first", loss="v0+taught",
    )  # fmt: skip
    record = options.record()
    assert json.loads(json.dumps(record)) == record
    assert "secret" not in json.dumps(record)
    assert (record["weights"], record["teacher"]) == ("w.pth", "first")
    assert (record["placement"], record["exits"], record["held_out"]) == ([1, 4], ["a", "b"], None)


def test_a_resumed_run_may_differ_in_what_changes_no_weight() -> None:
    before = TrainOptions().record()
    TrainOptions(output="elsewhere", workers=2, device="cpu", resume=True, test=True).check_same_run(before)
    assert set(FREE_TO_CHANGE) < before.keys()
    with pytest.raises(ValueError, match=r"seed=2, but the run to resume has 1; give the same, or start again"):
        TrainOptions(seed=2).check_same_run(before)


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_from_before_an_option_had_its_default(asked: bool) -> None:
    before = TrainOptions().record()
    del before["balance_gradients"]
    options = TrainOptions(balance_gradients=asked)
    if not asked:
        options.check_same_run(before)
        return
    with pytest.raises(ValueError, match="balance_gradients=True, but the run to resume has False"):
        options.check_same_run(before)
