"""Losses and accuracies by epoch → metrics.csv, replaced as a whole after every epoch."""

from __future__ import annotations

import csv
from io import StringIO
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from ..system import files


class _CurvesWriter(ExperimentWriter):
    def save(self) -> None:
        """Write all rows again: there is one per epoch, and a file with half a row would be no CSV file."""
        text = StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=sorted({name for row in self.metrics for name in row}))
        writer.writeheader()
        writer.writerows(self.metrics)
        files.write(self.metrics_file_path, text.getvalue())


class CurvesLogger(CSVLogger):
    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _CurvesWriter(self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """The report has them."""
