"""Processes that are forked: an error where work would never end, answers everywhere else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from eefast import ops

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

BEGIN = """
import multiprocessing, os, select, signal, sys, threading, time
import torch, eefast
from torch.utils.data import DataLoader

torch.set_num_threads(2)
torch.manual_seed(0)

def child(name, work):
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            print(f"{name}: {work()}", flush=True)
        except Exception as error:
            print(f"{name}: {type(error).__name__} {error}", flush=True)
        os._exit(0)
    for _ in range(1200):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    print(f"{name}: hangs", flush=True)

def attempt(work):
    try:
        return "answers" if len(work()) else "nothing"
    except RuntimeError as error:
        assert "'spawn'" in str(error) and "torch.set_num_threads(1)" in str(error), error
        return "refused"

x = torch.randn(64, 1, 8, 8)
ENGINES = sys.argv[1].split()
net = eefast.zoo.eenet("eenet8", num_exits=2, num_classes=3, input_shape=(1, 8, 8)).eval()
planned = lambda engine: eefast.accelerate(net, engine=engine)
"""

UNUSED = """
child("unused", lambda: [attempt(lambda: planned(e)(x).labels) for e in ENGINES])
torch.ones(5).add_(1)
child("few numbers", lambda: [attempt(lambda: list(planned(e).stream([x] * 3))) for e in ENGINES])
"""

ONLY_TORCH = """
with torch.no_grad():
    torch.nn.Conv2d(3, 64, 3)(torch.randn(64, 3, 32, 32))
child("after a convolution", lambda: attempt(lambda: planned("auto")(x).labels))
"""

USED = """
class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        return accelerated["compact"](x[i : i + 1]).logits[0]

accelerated = {e: planned(e) for e in ENGINES}
expected = {e: f(x) for e, f in accelerated.items()}
began = accelerated[ENGINES[-1]].stream([x] * 50)
next(began)

def called():
    return {e: attempt(lambda: f(x).labels) for e, f in accelerated.items()}

def everything():
    return {
        **called(),
        **{e + " stream": attempt(lambda: list(f.stream([x] * 3))) for e, f in accelerated.items()},
        **{e + " planned": attempt(lambda: planned(e)(x).labels) for e in accelerated},
    }

def on_one_thread(work=everything):
    torch.set_num_threads(1)
    found = work()
    assert all(torch.equal(f(x).exit_index, expected[e].exit_index) for e, f in accelerated.items())
    return found

def in_a_new_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(called()))
    thread.start()
    thread.join()
    return found[0]

child("used", everything)
child("on one thread", on_one_thread)
child("in a new thread", in_a_new_thread)
child("began before", lambda: torch.set_num_threads(1) or next(began))
context = multiprocessing.get_context("fork")
process = context.Process(target=lambda: print(f"multiprocessing: {on_one_thread(called)}", flush=True))
process.start()
process.join()
found = torch.cat(list(DataLoader(Images(), batch_size=2, num_workers=2, multiprocessing_context="fork")))
print("workers:", torch.allclose(found, expected["compact"].logits[:4], atol=1e-5))
"""


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each child said, in a process that has not run anything yet."""
    engines = "reference compact" if ops.CPP_MISSING else "reference compact resident"
    code = BEGIN + UNUSED + ONLY_TORCH + USED
    done = subprocess.run(
        [sys.executable, "-c", code, engines], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("when", ["unused", "few numbers", "on one thread", "in a new thread", "multiprocessing"])
def test_answers(said: dict[str, str], when: str) -> None:
    count = 3 if when == "on one thread" else 1
    assert said[when].count("answers") == count * (2 if ops.CPP_MISSING else 3)
    assert "refused" not in said[when]


@pytest.mark.parametrize("when", ["after a convolution", "used"])
def test_an_error_where_work_would_never_end(said: dict[str, str], when: str) -> None:
    count = 1 if when == "after a convolution" else 6 if ops.CPP_MISSING else 9
    assert said[when].count("refused") == count
    assert "answers" not in said[when]


def test_workers_of_a_data_loader(said: dict[str, str]) -> None:
    assert said["workers"] == "True"


@pytest.mark.skipif(bool(ops.CPP_MISSING), reason=f"the C++ kernels are {ops.CPP_MISSING}")
def test_a_stream_that_began_before(said: dict[str, str]) -> None:
    assert said["began before"].startswith(
        "RuntimeError this stream began in the process that this one was forked from"
    )
