"""Training runs killed at random moments, or at every write, and resumed → folders that must equal an undisturbed one.

By hand: python tests/helpers/kill_and_resume.py FOLDER DATA '{"net": "eenet8", …}' random 10, or … writes 1 to kill at
every write of a file from the first on, before and after it takes its name.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

# Reports of two runs differ in these, and in nothing else.
CLOCK, RESUME = "seconds_per_epoch", "resume"


def same_run(first, second):
    """Bit for bit the same network, in the best and in the last epoch, thresholds, and report but for the clock."""
    for name in ("model.safetensors", "config.json", "thresholds.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    for name in ("best.ckpt", "last.ckpt"):
        one, two = (torch.load(folder / name, weights_only=True) for folder in (first, second))
        assert one["epoch"] == two["epoch"], name
        assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items()), name
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    assert len({len(report.pop(CLOCK)) for report in reports}) == 1
    for report in reports:
        del report["arguments"][RESUME]
    assert reports[0] == reports[1]
    for folder in (first, second):
        assert not list(folder.rglob("*.partial"))
        assert not (folder / "started.json").exists()


def in_a_process(options, output, resume, *, killed_after=None, killed_at=None):
    """Train in a fork of this process, in which no tensor was ever computed; how it ended, as `os.waitpid` tells.

    killed_after: seconds; killed_at: (number of the write, whether before or after it takes its name).
    """
    process = os.fork()
    if process == 0:
        from eefast.train.options import TrainOptions
        from eefast.train.run import train

        torch.set_num_threads(1)
        if killed_at is not None:
            _kill_at(*killed_at)
        sys.stderr = Path(f"{output}.log").open("a")  # noqa: SIM115  until the process ends
        try:
            train(TrainOptions(output=output, resume=resume, **options))
        except FileNotFoundError as error:
            print(error, file=sys.stderr)
            os._exit(2)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _kill_at(number, before):
    replace, seen = Path.replace, []

    def counted(partial, target):
        seen.append(target)
        if before and len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(partial, target)
        if not before and len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    Path.replace = counted


def finish(options, output):
    """As a user does: resume, or start again where there is nothing to resume. Which of them it was."""
    code = in_a_process(options, output, True)
    if code == 2:
        assert in_a_process(options, output, False) == 0
        return "nothing to resume, started again"
    assert code == 0, Path(f"{output}.log").read_text()
    return "resumed"


def broken_runs(folder, options, kind, kills, seed=1):
    """The undisturbed run and those that were killed; each is compared, and says when it was killed."""
    import eefast.train.run  # noqa: F401  once, for all forks

    # The collector must not touch, and so copy, what all forks share.
    gc.freeze()
    begin = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    assert in_a_process(options, folder / "whole", False) == 0, (folder / "whole.log").read_text()
    seconds = time.perf_counter() - begin
    draw = random.Random(seed)
    # The first run is slower than those after it.
    moments = [draw.uniform(0, 0.7 * seconds) for _ in range(kills)]
    number = 0 if kind == "random" else 2 * kills - 2
    while True:
        output = folder / f"killed{number}"
        if kind == "random":
            if number == kills:
                return
            what = f"after {moments[number]:.2f} of {seconds:.2f} s"
            code = in_a_process(options, output, False, killed_after=moments[number])
        else:
            write, before = number // 2 + 1, number % 2 == 0
            what = f"{'before' if before else 'after'} write {write}"
            code = in_a_process(options, output, False, killed_at=(write, before))
            if code == 0:
                return
        assert code in (0, -signal.SIGKILL), (output.with_name(output.name + ".log")).read_text()
        there = sorted(path.name for path in output.glob("*")) if output.is_dir() else []
        how = finish(options, output)
        same_run(folder / "whole", output)
        print(f"killed {what} ({', '.join(there) or 'no files'}): {how}, the same bits", flush=True)
        number += 1


if __name__ == "__main__":
    place, data, options, kind, kills = sys.argv[1:]
    broken_runs(Path(place), {**json.loads(options), "data_root": data}, kind, int(kills))
