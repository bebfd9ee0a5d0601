"""What a worker says went wrong with a shard → the exception that ends the run."""

from __future__ import annotations

from ..system.files import WriteError


class ScoreError(RuntimeError):
    """Images could not be answered; finished shards stay."""


def failure(kind: str, text: str, number: int) -> Exception:
    """kind: name of the exception's class in the worker; text: what it says; number: of the shard."""
    more = "finished shards stay, and the same command goes on with the others"
    if kind == "ImageFileError":
        return ScoreError(f"{text}; or give on_error='record' (--on-error record), which makes it a row; {more}")
    if kind == "WriteError":
        return WriteError(f"{text}; {more}")
    return ScoreError(f"shard {number}: {kind}: {text}; {more}")


def death(number: int | None, code: int, signal_name: str | None) -> Exception:
    """A worker that ended twice at the same shard; code: its exit code, negative where a signal ended it."""
    how = f"signal {signal_name}" if signal_name else f"exit code {code}"
    where = "before its first shard" if number is None else f"at shard {number}, twice"
    more = " (SIGKILL is what Linux sends where memory is short: fewer workers need less)" if code == -9 else ""
    return ScoreError(f"a worker ended {where}, by {how}{more}; finished shards stay, and the same command goes on")
