"""Weights that a network starts from: put into a backbone, and checked for images that they must not have seen."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

from ..checkpoint import WEIGHTS_FILE, record_file
from ..checkpoint.weights import load_backbone
from ..record import TrainingRecord
from ..surgery.pretrained import weights_file
from .folder import BEST_FILE, LAST_FILE


def initialise(body: nn.Module, backbone: str, weights: str | Path, download: bool, frozen: bool) -> None:
    """Put weights into the backbone called `backbone`.

    weights: a file or folder, or a name as `surgery.pretrained.weights_file` takes it. Where they are for another
        number of classes, the last linear keeps its random weights, which is said on stderr.
    frozen: whether the backbone will not be trained. Raises `ValueError` where its last linear would stay random, and
        for weights that do not fit; `FileNotFoundError` for those that are not there.
    """
    path = Path(weights).expanduser()
    if not path.exists() and path.name == str(weights) and not path.suffix:
        path = weights_file(backbone, path.name, download)
    last = load_backbone(body, path)
    if last is None:
        return
    classes = body.get_submodule(last).out_features
    if frozen:
        raise ValueError(
            f"freeze_backbone=True keeps the last linear {last!r}, but weights={str(weights)!r} are for another number "
            f"of classes than {classes}; leave it out, or give weights for {classes} classes"
        )
    print(
        f"weights={str(weights)!r} are for another number of classes: the last linear {last!r} starts from random "
        f"weights, for {classes}",
        file=sys.stderr,
    )


def check_unseen(weights: str | Path, record: TrainingRecord) -> None:
    """`ValueError` where these weights learned from images that `record` holds out.

    weights: a folder of `eefast train` or a file in one; nothing is known of others.
    """
    path = Path(weights).expanduser()
    folder = path.parent if path.name in (WEIGHTS_FILE, BEST_FILE, LAST_FILE) else path
    before = record_file.read_of_any(folder) if folder.is_dir() else None
    if before is None or (before.dataset, before.fingerprint) != (record.dataset, record.fingerprint):
        return
    if (before.held_out, before.seed) != (record.held_out, record.seed):
        raise ValueError(
            f"weights={str(weights)!r} learned from these images but for {before.held_out:,} by seed {before.seed}; "
            f"now {record.held_out:,} by seed {record.seed} are held out, most of which they have seen; give "
            f"--held-out {before.held_out} --seed {before.seed}, or add --other-data (other_data=True) all the same"
        )
