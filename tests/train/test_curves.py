"""metrics.csv: a row per epoch, all rows in the file whenever it is written."""

import csv
from pathlib import Path

import pytest

from eefast.train.curves import CurvesLogger


@pytest.fixture
def logger(tmp_path: Path) -> CurvesLogger:
    return CurvesLogger(tmp_path, "logs", version=3)


def rows(logger: CurvesLogger) -> list[dict[str, str]]:
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_save_writes_all_rows(logger: CurvesLogger, tmp_path: Path) -> None:
    """Columns that come later are empty before."""
    logger.experiment.log_metrics({"loss": 0.5}, 1)
    logger.save()
    assert rows(logger) == [{"loss": "0.5", "step": "1"}]
    logger.experiment.log_metrics({"loss": 0.25, "accuracy": 0.75}, 2)
    logger.save()
    assert rows(logger) == [
        {"accuracy": "", "loss": "0.5", "step": "1"},
        {"accuracy": "0.75", "loss": "0.25", "step": "2"},
    ]
    assert [path.name for path in (tmp_path / "logs" / "version_3").iterdir()] == ["metrics.csv"]


def test_options_are_not_written(logger: CurvesLogger) -> None:
    """The report has them."""
    logger.log_hyperparams({"seed": 1})
    logger.experiment.log_metrics({"loss": 0.5}, 1)
    logger.save()
    assert [path.name for path in Path(logger.log_dir).iterdir()] == ["metrics.csv"]
