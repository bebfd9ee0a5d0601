"""Jobs as JSON → commands in forks of one process that has imported everything, so that each costs no start of Python.

Jobs: one per line of stdin.
A job: words; and what happens to it. signal: a number, sent once stderr has the text `seen`, `after` seconds later,
to its process, or with `group` to its worker processes too. missing: modules. limit: bytes that a file may have.
slow_gpu: there is a CUDA device, which does nothing but make `eefast calibrate-device` wait.
Results, a line each: code, out, err, left: processes of the command that are there five seconds after its end.
"""

import gc
import json
import os
import resource
import sys
import tempfile
import time
from signal import SIGKILL

LIMIT = 120
"""Seconds that a command may take; one that a signal did not stop is killed then."""


def run(words, signal=None, seen="", after=0.0, group=False, missing=(), limit=None, slow_gpu=False):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            os.setsid()
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            if limit is not None:
                # Python takes a cut off file of bytecode for a whole one.
                sys.dont_write_bytecode = True
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            for module in missing:
                for name in [n for n in sys.modules if n.split(".")[0] == module or n.startswith("eefast.cli")]:
                    del sys.modules[name]
                for name in [n for n in sys.modules if n.startswith("eefast.train.")]:
                    del sys.modules[name]
                sys.modules[module] = None
            if slow_gpu:
                torch.cuda.is_available, torch.cuda.get_device_name = (lambda: True), (lambda device: "slow")
                eefast.planning.launch_costs.measure = lambda device: time.sleep(60)
            sys.argv = ["eefast", *words]
            from eefast.cli import main

            main()
        if signal is not None:
            while seen not in text(err) and not os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.02)
            time.sleep(after)
            (os.killpg if group else os.kill)(process, signal)
        end = time.monotonic() + LIMIT
        while not (ended := os.waitpid(process, os.WNOHANG))[0]:
            time.sleep(0.01)
            if time.monotonic() > end:
                os.killpg(process, SIGKILL)
        code = os.waitstatus_to_exitcode(ended[1])
        left = True
        for _ in range(500):
            try:
                os.killpg(process, 0)
            except ProcessLookupError:
                left = False
                break
            time.sleep(0.01)
        return {"code": code, "out": text(out), "err": text(err), "left": left}


def text(file):
    return os.pread(file.fileno(), 1 << 20, 0).decode()


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    # Everything that a command imports, so that forks do not.
    import matplotlib.pyplot  # noqa: F401

    import eefast.cli.commands
    import eefast.measure.assessment
    import eefast.measure.demonstration
    import eefast.planning.launch_costs
    import eefast.train.run

    # The collector must not touch, and so copy, what all forks share.
    gc.freeze()
    for job in map(json.loads, sys.stdin):
        print(json.dumps(run(**job)), flush=True)
