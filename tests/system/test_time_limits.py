"""Calls with a time limit: what they return and raise, and what is left of one that does not end."""

from __future__ import annotations

import threading
import time

import pytest

from eefast.system.time_limits import within


def test_what_a_call_returns() -> None:
    assert within(60, lambda: threading.current_thread().name) == "eefast-time-limit"
    assert within(60, lambda: None) is None


def test_what_a_call_raises() -> None:
    def fails() -> None:
        raise OSError("no such device")

    with pytest.raises(OSError, match="no such device"):
        within(60, fails)


def test_a_call_that_does_not_end() -> None:
    ends = threading.Event()
    begin = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"it did not end within 0\.05 s"):
        within(0.05, lambda: ends.wait(60))
    assert time.perf_counter() - begin < 30
    (left,) = (t for t in threading.enumerate() if t.name == "eefast-time-limit")
    assert left.daemon  # a process that ends does not wait for it
    ends.set()
    left.join()
