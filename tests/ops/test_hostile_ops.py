"""Hostile calls of every op in other processes, and calls that ask for more memory than there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eefast import ops

FOLDER = Path(__file__).parents[1] / "helpers"


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=FOLDER, env=environment)


@pytest.mark.parametrize(
    ("cpp", "first", "count"),
    [("0", 0, 15), *(pytest.param(cpp, 0, 200, marks=pytest.mark.slow) for cpp in "10")],
    ids=["references", "all in cpp", "all references"],
)
def test_hostile_calls(cpp: str, first: int, count: int) -> None:
    """No signal, no error but those that name an argument, no answer out of range.

    Those of the kernels are made by `make sanitize-calls`, which looks closer.
    """
    found = run("hostile_ops.py", str(first), str(count), EEFAST_USE_CPP=cpp)
    assert found.returncode == 0, f"{found.stdout.splitlines()[-1:]} {found.stderr[-3000:]}"


MEMORY = """
import resource, torch
from resident_calls import op, victim
torch.set_num_threads(2)

def message(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)

wanted = op(*victim().values())
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
for threads in (1, 2):
    large = victim() | {"images": torch.zeros(1).expand(3, 3, 4000, 4000), "threads": threads}
    print(message(op, *large.values()))
print(message(op, *(victim() | {"images": torch.zeros(1).expand(2**40, 3, 8, 8)}).values()))
exit_head = torch.ops.eefast.exit_head.default
rows = torch.arange(64).int()
features, weight = torch.zeros(1).expand(64, 2**20, 1, 1), torch.zeros(2, 2**20)
out = torch.zeros(64, 1), torch.zeros(64), torch.zeros(64).long()
rest = torch.zeros(2), None, rows, rows, torch.tensor([64]).int(), "learned", 0, *out
print(message(exit_head, features, weight, *rest))
print(message(exit_head, features[:, :1].expand(64, 2**30, 1, 1), torch.zeros(1).expand(2, 2**30), *rest))
assert all(torch.equal(a, b) for a, b in zip(op(*victim().values()), wanted, strict=True))
"""


@pytest.mark.skipif(ops.CPP_MISSING is not None, reason=f"C++ kernels: {ops.CPP_MISSING}")
def test_memory_that_is_not_there() -> None:
    """Each says what for and how much, from whatever thread; the next call is right."""
    found = run("-c", MEMORY)
    assert found.returncode == 0, found.stdout + found.stderr
    maps = r"no memory could be had for a network's maps, \d{11} bytes for each thread; use fewer threads, a smaller .*"
    wanted = [
        maps,
        maps,
        r"no memory could be had for logits of shape \[1099511627776, 7\], 4 bytes each; give fewer .*",
    ]
    wanted += [r"no memory could be had for an exit's sums, \d{9} bytes for each thread; use fewer threads, .*"]
    # PyTorch 2.11 keeps its own reason to itself.
    reason = "(.*allocate 8589934592 bytes.*|.*API call failed.*)"
    wanted += [rf"weight of shape \[2, 1073741824\] cannot be made contiguous: {reason}"]
    lines = found.stdout.splitlines()
    assert len(lines) >= len(wanted)
    for line, pattern in zip(lines, wanted, strict=False):
        assert re.fullmatch(pattern, line), line
