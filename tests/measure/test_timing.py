"""Seconds per call on a clock that only the calls move, and the order of turns."""

from types import SimpleNamespace

import pytest

from eefast.measure import timing


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


@pytest.mark.parametrize(("least", "calls"), [(0.0, 1), (2.0, 1), (2.5, 2), (9.9, 5)])
def test_calls_are_repeated_until_they_take_long_enough(clock, least, calls):
    log = []

    def call():
        # Every call is slower than the last by 0.25 s.
        clock[0] += 2 + 0.25 * len(log)
        log.append("call")

    assert timing.mean_seconds(call, least) == pytest.approx(2 + 0.125 * (calls - 1))
    assert len(log) == calls


def test_the_device_is_waited_for_before_the_first_call_and_after_each(clock):
    log = []

    def call():
        clock[0] += 1
        log.append("call")

    def wait():
        clock[0] += 0.5
        log.append("wait")

    assert timing.mean_seconds(call, 2.0, wait) == 1.5
    assert log == ["wait", "call", "wait", "call", "wait"]


def test_another_clock(clock):
    found = iter([10.0, 11.0, 13.0])
    assert timing.mean_seconds(lambda: None, 2.0, clock=lambda: next(found)) == 1.5


def test_all_batches_are_run_in_order():
    seen = []
    assert timing.run_all(seen.append, iter([3, 1, 2])) is None
    assert seen == [3, 1, 2]


@pytest.mark.parametrize(("number", "order"), [(0, "abc"), (1, "cba"), (2, "abc"), (7, "cba")])
def test_odd_rounds_go_backwards_and_answers_keep_their_order(number, order):
    log = []
    turns = [lambda name=name: log.append(name) or name.upper() for name in "abc"]
    assert timing.in_turns(turns, number) == ["A", "B", "C"]
    assert "".join(log) == order


@pytest.mark.parametrize(
    ("values", "expected"),
    [([i / 1000 for i in range(101)], (0.02, 0.05, 0.08)), ([3.0, 1.0], (1.4, 2.0, 2.6)), ([7.0], (7, 7, 7))],
    ids=["many", "two", "one"],
)
def test_quantiles_lie_on_a_straight_line(values, expected):
    assert timing.quantiles(values, (0.2, 0.5, 0.8)) == pytest.approx(expected)
