"""Memory that is freed is used again without the system, which a process shows in its page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, numpy
from eefast.system.memory import keep_freed
if sys.argv[1] == "kept":
    keep_freed()

def maps():
    made = [numpy.empty(4 * 2**20, numpy.uint8) for _ in range(3)]
    for part in made:
        part.fill(1)

for _ in range(3):
    maps()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    maps()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other rules")
def test_freed_maps_are_used_again() -> None:
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, check=True, env={}).stdout)
        for way in ("kept", "given back")
    )
    assert kept < 20
    assert kept < given_back / 10  # 3,000 pages, or some large ones
