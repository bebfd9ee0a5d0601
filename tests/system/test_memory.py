"""Memory that is freed is used again without the system, which a process shows in its page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import os, resource, numpy
from eefast.system.memory import keep_freed
if os.fork() == 0:
    keep_freed()
else:
    os.wait()

def maps():
    made = [numpy.empty(4 * 2**20, numpy.uint8) for _ in range(3)]
    for part in made:
        part.fill(1)

for _ in range(3):
    maps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    maps()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10, flush=True)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_freed_maps_are_used_again() -> None:
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, env={}).stdout
    kept, given_back = map(int, found.split())
    assert kept < 20
    assert kept < given_back / 10  # 3,000 pages, or some large ones
