"""PyTorch's parallel regions have one thread where they should, as PyTorch itself reports, and only there."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from eefast.system import openmp
from eefast.system.openmp import adjustable, all_threads, one_thread


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def workers() -> int:
    """What OpenMP says of the calling thread."""
    found = re.search(r"omp_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    assert found
    return int(found[1])


linux = pytest.mark.skipif(sys.platform == "win32", reason="the functions of OpenMP are not found on Windows")


@linux
def test_one_thread_within_and_as_many_as_before_afterwards() -> None:
    assert adjustable()
    with one_thread():
        assert (workers(), torch.get_num_threads(), adjustable()) == (1, 1, False)
        with one_thread():
            assert workers() == 1
        assert workers() == 1
        with all_threads():
            assert workers() == 3
            with one_thread():
                assert workers() == 1
            assert workers() == 3
        assert workers() == 1
    assert workers() == 3


@linux
def test_nothing_changes_where_nothing_is_wanted_or_nothing_was_changed() -> None:
    with one_thread(False):
        assert workers() == 3
    with all_threads():
        assert workers() == 3
    torch.set_num_threads(1)
    assert not adjustable()
    with one_thread(), all_threads():
        assert workers() == 1
    assert workers() == 1


@linux
def test_an_exception_leaves_all_as_it_was() -> None:
    with pytest.raises(KeyError), one_thread(), all_threads():
        raise KeyError
    assert workers() == 3
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    with all_threads():
        assert workers() == 3


@linux
@pytest.mark.parametrize("context", [one_thread, all_threads])
def test_an_interrupt_at_any_call_leaves_all_as_it_was(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a signal's handler raises, which Python calls when the function of the library has returned."""
    set_number = openmp._set_number()
    assert set_number
    for at in range(4):
        calls: list[int] = []

        def interrupted(number: int, at: int = at, calls: list[int] = calls) -> None:
            set_number(number)
            calls.append(number)
            if len(calls) == at + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(openmp, "_set_number", lambda: interrupted)
            with suppress(KeyboardInterrupt), one_thread(), context():
                pass
        assert (workers(), openmp._this.before) == (3, 0)


@linux
def test_other_threads_keep_theirs_also_those_that_start_meanwhile() -> None:
    inside, ready = threading.Event(), threading.Event()
    found: dict[str, list[int]] = {"before": [], "meanwhile": []}

    def started_before() -> None:
        found["before"].append(workers())
        ready.set()
        inside.wait(10)
        found["before"].append(workers())

    def started_meanwhile() -> None:
        # The first thing that this thread does with PyTorch.
        with one_thread():
            torch.ones(2**20).add_(1)
            found["meanwhile"].append(workers())
        found["meanwhile"].append(workers())

    first, second = (threading.Thread(target=work) for work in (started_before, started_meanwhile))
    first.start()
    ready.wait(10)
    with one_thread():
        inside.set()
        first.join()
        second.start()
        second.join()
        assert workers() == 1
    assert found == {"before": [3, 3], "meanwhile": [1, 3]}


def test_where_openmp_is_not_found_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmp, "_set_number", lambda: None)
    assert not adjustable()
    with one_thread():
        assert torch.get_num_threads() == 3
        with all_threads():
            assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == 3
