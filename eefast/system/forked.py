"""Process → an error where it was forked from one with threads, for which PyTorch would wait forever."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from threading import get_ident

import torch

SECONDS = 5.0
"""Longest time for the trial, which takes milliseconds where threads work."""

_inherited: int | None = None
"""In a forked process the thread that was copied, until it is known to work; threads started after the fork work."""

_stuck = False


def check() -> None:
    """`RuntimeError` where work on several threads would never end: after a fork, on the thread that was copied.

    OpenMP keeps a pool for each thread that has run something in parallel. After a fork the pool still counts threads
    that the new process does not have. Threads started after the fork get new pools.
    """
    global _inherited, _stuck
    if _inherited is None or _inherited != get_ident() or torch.get_num_threads() == 1:
        return
    _stuck = _stuck or not _several_threads_work()
    if _stuck:
        raise RuntimeError(
            "this process was forked from one in which PyTorch had used several threads, and would wait for them for "
            "ever; start it by 'spawn' instead (multiprocessing.get_context('spawn')), or call "
            "torch.set_num_threads(1) in it first"
        )
    _inherited = None


def in_child(call: Callable[[], None]) -> None:
    """Call something in every process that is forked from this one."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=call)


def _several_threads_work() -> bool:
    """Tried in another forked process, since a thread that hangs cannot be stopped otherwise."""
    reads, writes = os.pipe()
    try:
        child = os.fork()
    except OSError:
        child = -1
    if child == 0:
        try:
            torch.ones(2**20).add_(1)  # large enough for PyTorch to share it among threads
            os.write(writes, b"1")
        finally:
            os._exit(0)
    os.close(writes)
    try:
        done, _, _ = select.select([reads], [], [], SECONDS if child > 0 else 0)
        return bool(done) and os.read(reads, 1) == b"1"
    finally:
        os.close(reads)
        if child > 0:
            with suppress(OSError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _remember() -> None:
    global _inherited, _stuck
    _inherited, _stuck = get_ident(), False


in_child(_remember)
