"""A call → what it returns, or a `TimeoutError` where that takes too long; the call then goes on in its thread."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, in a thread of its own, which a process that ends does not wait for."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(call())
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=work, name="eefast-time-limit", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed.pop()
    if not found:
        raise TimeoutError(f"it did not end within {seconds:g} s")
    return found.pop()
