"""Progress of work over items."""

import io
from types import SimpleNamespace

import pytest

from eefast.system import progress
from eefast.system.progress import Late, counted, reported


def test_every_item_is_one_step():
    steps = []
    assert list(reported("abc", "work", lambda *step: steps.append(step))) == ["a", "b", "c"]
    assert steps == [("work", 0, 3), ("work", 1, 3), ("work", 2, 3), ("work", 3, 3)]


def test_no_items_are_no_steps():
    steps = []
    assert list(reported([], "work", lambda *step: steps.append(step))) == []
    assert steps == [("work", 0, 0)]


def test_steps_are_reported_after_the_work_on_their_item():
    log = []
    for item in counted([2, 5], "work", lambda what, done, total: log.append((done, total)), 7, lambda item: item):
        log.append(item)
    assert log == [(0, 7), 2, (2, 7), 5, (7, 7)]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_late_work_says_how_far_it_is_on_a_terminal(monkeypatch, stream):
    clock = iter([10.0, 11.5, 12.5, 14.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    said = stream()
    late = Late(said)
    late("planning stages", 0, 3)
    assert said.getvalue() == ""
    late("planning stages", 1, 3)
    late("tuning", 2, 3)
    late.close()
    late.close()
    first, second = "eefast: planning stages, 1 of 3, 2 s", "eefast: tuning, 2 of 3, 4 s"
    gone = "\r" + " " * len(second) + "\r"
    assert said.getvalue() == (f"\r{first}\r{second.ljust(len(first))}{gone}" if stream is Terminal else "")


def test_short_work_leaves_the_terminal_alone():
    said = Terminal()
    late = Late(said)
    late("planning", 0, 1)
    late.close()
    assert said.getvalue() == ""
