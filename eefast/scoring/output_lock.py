"""A folder that is written to → an error where another run writes there; locks of killed processes do not count."""

from __future__ import annotations

import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

Share = tuple[int, int]
"""(i, n): every n-th shard, from number i on."""


@contextmanager
def locked(folder: Path, share: Share) -> Iterator[None]:
    """In here no other run writes the same shards into `folder`; other shares of the same n may run.

    The operating system ends the lock of a process that was killed; file systems over the network have it, too.
    Raises `ValueError`, which names the other process.
    """
    mine = folder / f"run-{share[0]}-of-{share[1]}.lock"
    with ExitStack() as held:
        with _guard(folder):
            for path in sorted(folder.glob("run-*-of-*.lock")):
                found = re.fullmatch(r"run-(\d+)-of-(\d+)\.lock", path.name)
                apart = found and int(found[2]) == share[1] and int(found[1]) != share[0]
                if not apart and path != mine and not _is_stale(path):
                    raise _taken(folder, path)
            lock = held.enter_context(mine.open("a+"))
            if not _try(lock.fileno()):
                raise _taken(folder, mine)
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}")
            lock.flush()
        try:
            yield
        finally:
            with _guard(folder):
                mine.unlink(missing_ok=True)


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """One process at a time looks at the locks and changes them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_stale(path: Path) -> bool:
    with path.open("a+") as lock:
        return _try(lock.fileno())


def _try(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _taken(folder: Path, path: Path) -> ValueError:
    return ValueError(
        f"{folder} is written to by another run ({path.read_text() or 'which has just begun'}, {path.name}); wait for "
        "it, end it, or take another folder"
    )
