"""Runs that save their survivors at every exit, killed at random moments and continued from the file.

By hand: python tests/helpers/killed_partial_runs.py FOLDER 20
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from networks import images, lived_in, spread_thresholds
from safetensors.torch import load_file, save

import eefast
from eefast import zoo
from eefast.survivors import Survivors
from eefast.system import files

SHAPE, COUNT = (3, 12, 11), 67
BATCHES = 5


def network() -> eefast.EarlyExitNet:
    net = lived_in(zoo.eenet("eenet20", 3, input_shape=SHAPE), 0)
    spread_thresholds(net, images(COUNT, SHAPE), 0.3)
    return net


def run(fast: eefast.Accelerated, folder: Path) -> None:
    """Answer all batches, stopping after every exit; what is there already is not computed again.

    A stop writes the answers first, then the survivors, under the number of the exit: whatever is written when the
    process dies, the last whole pair says how to go on.
    """
    for b in range(BATCHES):
        x = images(COUNT, SHAPE, seed=b)
        for exit_index in range(fast.num_exits + 1):
            answers, state = folder / f"{b}-{exit_index}.answers", folder / f"{b}-{exit_index}.state"
            if answers.exists() and (exit_index == fast.num_exits or state.exists()):
                continue
            before = Survivors.load(folder / f"{b}-{exit_index - 1}.state") if exit_index else None
            if exit_index == fast.num_exits:
                assert before is not None
                result, rows, survivors = fast.resume(before), before.positions, None
            else:
                partial = fast.until(exit_index)(x if before is None else before)
                result = eefast.ExitResult(*(part[partial.exited] for part in partial.result))
                rows = torch.arange(COUNT) if before is None else before.positions
                rows, survivors = rows[partial.exited], partial.survivors
            files.write(answers, save({"rows": rows, "exits": result.exit_index, "logits": result.logits}))
            if survivors is not None:
                survivors.save(state)


def killed_after(fast: eefast.Accelerated, folder: Path, count: int, seconds: float) -> bool:
    """Whether the run, in a fork of this process, was killed before its end: `seconds` after it has `count` files."""
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)
            run(fast, folder)
        finally:
            os._exit(0)
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < count and time.monotonic() < end:
        time.sleep(1e-4)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def check(folder: Path, fast: eefast.Accelerated) -> None:
    """Every image has exactly one answer, with the bits of the whole run."""
    for b in range(BATCHES):
        whole, seen = fast(images(COUNT, SHAPE, seed=b)), torch.zeros(COUNT, dtype=torch.int64)
        for path in sorted(folder.glob(f"{b}-*.answers")):
            found = load_file(path)
            seen[found["rows"]] += 1
            assert torch.equal(found["exits"], whole.exit_index[found["rows"]]), path
            assert torch.equal(found["logits"], whole.logits[found["rows"]]), path
        assert seen.eq(1).all(), f"{seen.eq(0).sum()} images without an answer, {seen.gt(1).sum()} with several"


def killed_and_continued(folder: Path, times: int, seed: int = 0) -> int:
    """Kill and continue a run that many times, then let it end and check it; the number of runs that were killed."""
    r, killed = random.Random(seed), 0
    fast = eefast.accelerate(network(), engine="resident")
    begin = time.perf_counter()
    (folder / "whole").mkdir()
    run(fast, folder / "whole")
    files_of_all = len(list((folder / "whole").iterdir()))
    each = (time.perf_counter() - begin) / files_of_all
    check(folder / "whole", fast)
    for i in range(times):
        here = folder / str(i)
        here.mkdir()
        killed += killed_after(fast, here, r.randrange(files_of_all - 2), r.uniform(0, each))
        run(fast, here)
        check(here, fast)
    return killed


if __name__ == "__main__":
    print(killed_and_continued(Path(sys.argv[1]), int(sys.argv[2])), "runs were killed; every image has its answer")
