"""Process → the same process, whose C library keeps freed memory for the next call instead of giving it back."""

from __future__ import annotations

import numpy

LARGEST = 31 * 2**20
"""Bytes: glibc learns from blocks of up to 32 MB, its header included."""


def keep_freed() -> None:
    """Blocks of up to 31 MB that are freed stay with the process, up to 62 MB of them at the end of its heap.

    By default glibc hands large blocks back to the system, which fills them with zeros again when they are next used:
    for the maps of a network after every layer. When such a block was freed, it takes that size for a common one, and
    keeps blocks up to it (mallopt(3), dynamic adjustment of M_MMAP_THRESHOLD). Nothing of the memory here is touched.
    Where the environment sets MALLOC_MMAP_THRESHOLD_ and the like, and in other C libraries, nothing changes.
    """
    numpy.empty(LARGEST, numpy.uint8)
