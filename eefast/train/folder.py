"""The output folder of a run: the names of its files, and its state before training starts."""

from __future__ import annotations

import json
from pathlib import Path

from ..checkpoint import CONFIG_FILE, RECORD_FILE, WEIGHTS_FILE
from ..system import files
from ..thresholds.calibration import THRESHOLDS_FILE
from .options import TrainOptions

REPORT_FILE, LOGS_FOLDER = "report.json", "logs"
BEST_FILE, LAST_FILE = "best.ckpt", "last.ckpt"
# Has the options until the run ends; after that the report has them.
STARTED_FILE = "started.json"
_WRITTEN = (
    BEST_FILE, LAST_FILE, STARTED_FILE, WEIGHTS_FILE, CONFIG_FILE, RECORD_FILE,
    THRESHOLDS_FILE, REPORT_FILE, f"{LOGS_FOLDER}/*/metrics.csv",
)  # fmt: skip


def begin(output: Path, options: TrainOptions) -> None:
    """Make the folder, check that it is writable, remove what a killed run left, and record what runs there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output={str(output)!r} cannot be made: {error.strerror}; name another folder") from error
    files.check(output / LAST_FILE)
    files.remove_partial(output, *_WRITTEN)
    files.write(output / STARTED_FILE, json.dumps({"arguments": options.record()}, indent=2) + "\n")
