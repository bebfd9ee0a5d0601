"""The folder of an interrupted run → the checkpoint that it continues from, if it is of the same run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .checkpoints import CHECKPOINT_FORMAT, read_checkpoint
from .folder import BEST_FILE, LAST_FILE, STARTED_FILE
from .options import TrainOptions


def find_checkpoint(output: Path, options: TrainOptions) -> Path | None:
    """last.ckpt, or None where the run has not finished an epoch; `ValueError` where it is of another run or damaged.

    Raises `FileNotFoundError` where no run was started.
    """
    path, started = output / LAST_FILE, _is_started(output / STARTED_FILE, options)
    if path.exists() and _is_of_this_run(path, options, started):
        try:
            read_checkpoint(output / BEST_FILE)
        except ValueError as error:
            raise ValueError(f"resume=True: {error}; start again without --resume (resume=False)") from error
        return path
    if not started:
        raise FileNotFoundError(
            f"resume=True: there is no {path}; name the folder of the interrupted run, or start again without "
            "--resume (resume=False)"
        )
    print(f"resume: no epoch of the run in {output} was finished, it starts again", file=sys.stderr, flush=True)
    return None


def _is_started(path: Path, options: TrainOptions) -> bool:
    """Whether this run was started and has not ended; `ValueError` where it is another one."""
    if not path.is_file():
        return False
    try:
        options.check_same_run(json.loads(path.read_text())["arguments"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume=True: {path} is damaged; delete it, or start again without resume") from error
    return True


def _is_of_this_run(path: Path, options: TrainOptions, started: bool) -> bool:
    """Whether this run wrote last.ckpt; if it was started, the file may be of an earlier one in the same folder."""
    way_out = "delete it, or start again without --resume (resume=False)"
    try:
        found = read_checkpoint(path)
    except ValueError as error:
        instead = _best_instead(path.with_name(BEST_FILE), options)
        raise ValueError(f"resume=True: {error}; {instead}{way_out}") from error
    if found["format"] > CHECKPOINT_FORMAT:
        raise ValueError(f"resume=True: {path} was written by a newer eefast; install that, or {way_out}")
    try:
        options.check_same_run(found["arguments"])
    except ValueError:
        if not started:
            raise
        return False
    return True


def _best_instead(best: Path, options: TrainOptions) -> str:
    """The way out that best.ckpt offers, if it is of the same run."""
    try:
        found = read_checkpoint(best)
        options.check_same_run(found["arguments"])
    except ValueError:
        return ""
    return f"copy {best}, of epoch {found['epoch'] + 1}, over it, "
