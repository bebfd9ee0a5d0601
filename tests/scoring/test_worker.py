"""A worker process by itself: its messages, and its end when the other end of the pipe is closed."""

import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import pytest
from test_pipeline import job_of

from eefast.scoring.image_folder import ImageFolder
from eefast.scoring.manifest import LISTING_FILE

pytest.importorskip("pyarrow", reason='pyarrow is not installed; pip install "eefast[score]" brings it')


@pytest.mark.slow
def test_messages_and_end(network: Path, pictures: Path, tmp_path: Path) -> None:
    job = job_of(network, ImageFolder(pictures), tmp_path / "out")
    with (job.output / LISTING_FILE).open("wb") as listing:
        first, second = job.source.plan(20, listing)
    here, there = Pipe()
    code = "import sys; from eefast.scoring.worker import main; main(int(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", code, str(there.fileno())], pass_fds=[there.fileno()])
    there.close()
    here.send(pickle.dumps(job))
    assert here.recv()[0] == "ready"
    here.send(first)
    here.send(replace(second, count=4))
    messages = [here.recv() for _ in range(3)]
    done, failed = (next(m for m in messages if m[0] == kind) for kind in ("done", "failed"))
    assert done[1] == 0
    assert done[2].images == 20
    assert failed[1:3] == (1, "RuntimeError")
    here.close()
    assert process.wait(30) == 1
