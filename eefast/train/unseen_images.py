"""Weights to start from → refused where they learned from images that are held out now."""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import WEIGHTS_FILE, record_file
from ..record import TrainingRecord
from .folder import BEST_FILE, LAST_FILE


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
