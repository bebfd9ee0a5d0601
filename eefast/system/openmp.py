"""Thread → the same thread, in which PyTorch for a while does not wake OpenMP's threads.

These spin for milliseconds after their work, and take the cores from other libraries' threads.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import local

import torch


class _Thread(local):
    """before: how many threads work for this one, as the outermost `one_thread` found them; 0 outside of it."""

    before = 0


_this = _Thread()


@cache
def _set_number() -> Callable[[int], object] | None:
    """Of the OpenMP that PyTorch uses; it acts on the calling thread alone. None where it is not found.

    `torch.set_num_threads` acts on threads that start later, too, and empties caches of the whole process.
    """
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).omp_set_num_threads
    except (OSError, AttributeError):
        return None
    found.argtypes, found.restype = [ctypes.c_int], None
    return found


def adjustable() -> bool:
    """Whether `one_thread` changes anything."""
    return torch.get_num_threads() > 1 and _set_number() is not None


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """PyTorch's ops of the calling thread run in it alone; those of other threads as before.

    wanted: False: nothing changes.
    """
    if not wanted:
        yield
        return
    # Asked for the first time in a thread, PyTorch sets its number, which later would undo what is set here.
    before, set_number = torch.get_num_threads(), _set_number()
    if before == 1 or set_number is None:
        yield
        return
    # An interrupt may come after any line; then the number is set last, so that it is right again.
    try:
        _this.before = before
        set_number(1)
        yield
    finally:
        _this.before = 0
        set_number(before)


@contextmanager
def all_threads() -> Iterator[None]:
    """Within `one_thread` as many threads as outside of it."""
    before, set_number = _this.before, _set_number()
    if not before or set_number is None:
        yield
        return
    try:
        _this.before = 0
        set_number(before)
        yield
    finally:
        _this.before = before
        set_number(1)
