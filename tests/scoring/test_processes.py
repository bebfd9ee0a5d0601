"""Workers that die, that cannot start, and that say what is wrong with an image."""

from dataclasses import replace
from pathlib import Path

import pytest
from scored_rows import Dying, rows_of
from test_pipeline import job_of

from eefast.scoring.failures import ScoreError
from eefast.scoring.image_folder import ImageFolder
from eefast.scoring.manifest import LISTING_FILE
from eefast.scoring.processes import run_in_processes

pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')


class Watcher:
    def __init__(self):
        self.started, self.shards, self.images = 0, [], []

    def ready(self):
        self.started += 1

    def done(self, shard, totals):
        self.shards.append(shard.number)

    def tick(self, more):
        self.images.append(sum(part.images for part in more))


def listed(job, shard_size):
    with (job.output / LISTING_FILE).open("wb") as listing:
        return job.source.plan(shard_size, listing)


@pytest.mark.slow
def test_a_worker_that_dies_twice_at_a_shard_is_named_and_finished_shards_stay(
    network: Path, pictures: Path, tmp_path: Path
) -> None:
    job, watcher = job_of(network, Dying(pictures), tmp_path / "out"), Watcher()
    shards = listed(job, 10)
    with pytest.raises(ScoreError, match=r"ended at shard [01], twice, by exit code 7; finished shards stay"):
        run_in_processes(job, shards, 1, watcher)
    assert watcher.started == 2
    run_in_processes(replace(job, source=ImageFolder(pictures)), shards[1:], 1, watcher)
    if 0 in watcher.shards:
        assert len(rows_of(job.output)) == 23


@pytest.mark.slow
def test_a_network_that_cannot_run_as_asked(network: Path, pictures: Path, tmp_path: Path) -> None:
    job = job_of(network, ImageFolder(pictures), tmp_path / "out", engine="fastest")
    with pytest.raises(ValueError, match="engine='fastest'"):
        run_in_processes(job, listed(job, 10), 1, Watcher())
