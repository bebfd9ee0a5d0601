"""Peers on PyTorch's allocator in a process where glibc keeps freed memory, which spares them page faults."""

from __future__ import annotations

from dataclasses import replace

from . import eefast_engines
from .package_baselines import EAGER, MASKED_FOLDED

# By default a map above a size that glibc chooses is handed back to the system and faulted in again at the next call.
# On a virtual machine that took up to two fifths of the time, see docs/benchmarks.md; the variables: mallopt(3).
VARIABLES = (("MALLOC_MMAP_MAX_", "0"), ("MALLOC_TRIM_THRESHOLD_", str(2**34)))

PEERS = tuple(
    replace(peer, name=f"{peer.name}, memory kept", family="memory kept", variables=VARIABLES)
    for peer in (EAGER, MASKED_FOLDED, eefast_engines.COMPACT)
)
