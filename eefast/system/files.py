"""Content → files that are replaced as a whole: written under another name, then renamed; removed upon failure."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"

# (file that is written, name that it will take), in the order of their writing.
_Waiting = list[tuple[Path, Path]]
_waiting: ContextVar[_Waiting | None] = ContextVar("waiting", default=None)


class WriteError(OSError):
    """A file could not be written; those that were there are unchanged."""


@contextmanager
def together() -> Iterator[None]:
    """Files that `write` writes in here get their names at the end, all of them, or none if there was an error."""
    if _waiting.get() is not None:
        yield
        return
    waiting: _Waiting = []
    token = _waiting.set(waiting)
    try:
        yield
        try:
            _rename(waiting)
        except KeyboardInterrupt:
            # Files that belong together would disagree.
            _rename([names for names in waiting if names[0].exists()])
            raise
    finally:
        _waiting.reset(token)
        for partial, _ in waiting:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write(path: str | Path, content: bytes | memoryview | str) -> None:
    """Make or replace a file; readers find the old one or the new one, whole, at any time and after a crash.

    content: text becomes UTF-8. A symbolic link stays, and the file that it names is replaced; that file's permissions
    stay, a new file gets those of the umask. Anything but a regular file, such as /dev/stdout, is written to directly.
    Raises `WriteError`, naming the file.
    """
    data = content.encode() if isinstance(content, str) else content
    target, partial = _names(path)
    with together():
        try:
            if target.exists() and not target.is_file():
                target.write_bytes(data)
                return
            waiting = _waiting.get()
            assert waiting is not None
            waiting.append((partial, target))
            with partial.open("xb") as file:
                _allow_as(target, partial)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _failed(path, error) from error


@contextmanager
def replaced(path: str | Path) -> Iterator[BinaryIO]:
    """A file that is written piece by piece in here, and takes its name at the end; removed after an error.

    Raises `WriteError`, naming the file.
    """
    target, partial = _names(path)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise _failed(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def check(path: str | Path) -> None:
    """`ValueError` unless `write` could write there; tried, before work starts, by making a file and removing it."""
    target, partial = _names(path)
    if target.is_dir():
        raise ValueError(f"{path} cannot be written: it is a folder; name a file in it")
    if not target.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {target.parent}; make it first")
    if target.exists() and not target.is_file():
        return
    try:
        partial.touch(exist_ok=False)
        _allow_as(target, partial)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {_why(error)}; name another folder") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def remove_partial(folder: Path, *names: str) -> None:
    """Remove what a killed process left of files with these names (patterns)."""
    for name in names:
        for partial in folder.glob(f"{name}.{'[0-9a-f]' * 8}{PARTIAL}"):
            with suppress(OSError):
                partial.unlink()


def _names(path: str | Path) -> tuple[Path, Path]:
    """The file, links followed, and an unused name beside it."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f"{target.name[:40]}.{secrets.token_hex(4)}{PARTIAL}")


def _rename(waiting: _Waiting) -> None:
    for partial, target in waiting:
        try:
            partial.replace(target)
        except OSError as error:
            raise _failed(target, error) from error


def _allow_as(target: Path, partial: Path) -> None:
    """Copy owner and permissions of the file that is replaced; `PermissionError` where it is write-protected."""
    if not target.exists():
        return
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    found = target.stat()
    with suppress(OSError, AttributeError):
        # Only root can give files away.
        os.chown(partial, found.st_uid, found.st_gid)
    partial.chmod(found.st_mode & 0o777)


def _failed(path: str | Path, error: OSError) -> WriteError:
    failed = WriteError(
        f"{path} cannot be written: {_why(error)}; what was there is unchanged; make room, or name another place"
    )
    failed.errno = error.errno
    return failed


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
