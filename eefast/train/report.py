"""A trained network and the images held out → its thresholds, what they are worth, and the files that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..criteria import CRITERIA, get
from ..model import EarlyExitNet
from ..result import ExitOutput
from ..system import files
from ..system.strict_json import json_text
from ..thresholds.calibration import THRESHOLDS_FILE, Calibration, calibrate
from ..thresholds.outputs import collect, exits_taken, outcome
from .folder import REPORT_FILE
from .options import TrainOptions
from .trainer import Fitted


@dataclass(frozen=True)
class TrainReport:
    """What a training run measured; `report.json` holds the same.

    arguments: `TrainOptions.record`, with the number of held-out images.
    best_epoch: 1 …, the epoch whose weights were saved: the one with the lowest held-out loss, `best_held_out_loss`.
    exit_accuracy: held-out accuracy of every exit for all images.
    exit_agreement: share of the held-out images for which an exit gives the final exit's answer.
    held_out, test: per criterion in `eefast.criteria`, its thresholds and their accuracy and mean cost; `test` is None
        unless it was asked for. The thresholds always come from the held-out images.
    held_out_agreement, test_agreement: per criterion, share of the images whose answer is that of the final exit.
    seconds_per_epoch: wall clock, one number per epoch, validation included.
    """

    arguments: dict[str, Any]
    best_epoch: int
    best_held_out_loss: float
    exit_accuracy: list[float]
    exit_agreement: list[float]
    held_out: dict[str, Calibration]
    held_out_agreement: dict[str, float]
    test: dict[str, Calibration] | None
    test_agreement: dict[str, float] | None
    seconds_per_epoch: list[float]


def make_report(
    options: TrainOptions,
    fitted: Fitted,
    network: EarlyExitNet,
    held_out: DataLoader,
    test: DataLoader | None,
) -> TrainReport:
    """Choose thresholds for every criterion on `held_out`, and measure them there and on `test`.

    network: has the weights of the best epoch, in eval mode; gets the thresholds of its criterion.
    held_out, test: batches (uint8 images [n, C, H, W], labels [n] int64).
    """
    outputs, labels = collect(network, held_out)
    answers = torch.stack([out.logits.argmax(dim=1) for out in outputs])
    exit_accuracy = _shares(answers == labels)
    limit = options.max_cost
    bound = (
        {"max_cost": limit} if limit is not None else {"min_accuracy": exit_accuracy[-1] - options.max_accuracy_drop}
    )
    chosen = {name: calibrate(outputs, labels, network.cost, name, **bound) for name in CRITERIA}
    network.thresholds.copy_(torch.tensor(chosen[network.criterion.name].thresholds))
    tested, test_agreement = None, None
    if test is not None:
        test_outputs, test_labels = collect(network, test)
        tested = {
            name: Calibration(name, c.thresholds, *outcome(test_outputs, test_labels, network.cost, name, c.thresholds))
            for name, c in chosen.items()
        }
        test_agreement = {name: _agreement(test_outputs, c) for name, c in chosen.items()}
    return TrainReport(
        arguments={**options.record(), "held_out": len(labels)},
        best_epoch=fitted.best["epoch"] + 1,
        best_held_out_loss=fitted.best_held_out_loss,
        exit_accuracy=exit_accuracy,
        exit_agreement=_shares(answers == answers[-1]),
        held_out=chosen,
        held_out_agreement={name: _agreement(outputs, c) for name, c in chosen.items()},
        test=tested,
        test_agreement=test_agreement,
        seconds_per_epoch=fitted.seconds_per_epoch,
    )


def write_report(folder: Path, report: TrainReport) -> None:
    """thresholds.json and report.json."""
    thresholds = {name: list(c.thresholds) for name, c in report.held_out.items()}
    for name, content in ((THRESHOLDS_FILE, thresholds), (REPORT_FILE, asdict(report))):
        files.write(folder / name, json_text(content))


def _shares(found: Tensor) -> list[float]:
    """[exits, N] bool → per exit, the share of images."""
    shares: list[float] = found.double().mean(dim=1).tolist()
    return shares


def _agreement(outputs: Sequence[ExitOutput], chosen: Calibration) -> float:
    """Share of the images whose answer is that of the final exit."""
    answers = torch.stack([out.logits.argmax(dim=1) for out in outputs])
    taken: Tensor = answers.gather(0, exits_taken(outputs, get(chosen.criterion), chosen.thresholds)[None])[0]
    return (taken == answers[-1]).double().mean().item()
