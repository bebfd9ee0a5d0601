"""Usual durations beside NumPy's quantiles, and the exits that they allow."""

import sys
import threading

import numpy as np
import pytest

from eefast.serving.durations import RECENT, CallDurations, Usual


def test_usual_is_the_quantile_of_what_was_seen_last():
    numbers = np.random.default_rng(0).exponential(1.0, 257).tolist()
    usual = Usual(numbers[0])
    for count in range(1, len(numbers) + 1):
        recent = numbers[max(count - RECENT, 0) : count]
        assert usual.value == np.quantile(recent, 0.9, method="higher")
        if count < len(numbers):
            usual.add(numbers[count])


def test_threads_that_add_at_once_lose_nothing():
    usual, failed, before = Usual(1.0), [], sys.getswitchinterval()

    def add(seed):
        try:
            for number in np.random.default_rng(seed).exponential(1.0, 5000).tolist():
                usual.add(number)
        except Exception as error:
            failed.append(error)

    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not failed
    for number in range(RECENT):
        usual.add(float(number))
    assert usual.value == np.quantile(range(RECENT), 0.9, method="higher")


@pytest.mark.parametrize(("seconds", "last"), [(0.0, 0), (0.9, 0), (1.0, 0), (2.1, 1), (9.0, 2), (-1.0, 0)])
def test_the_last_exit_that_fits(seconds, last):
    assert CallDurations([1.0, 2.0, 5.0]).last_exit(seconds) == last


def test_slower_calls_leave_time_for_fewer_exits():
    durations = CallDurations([1.0, 2.0, 5.0])
    assert durations.last_exit(6.0) == 2
    for exit_index in [0, 1, 2] * 11:
        durations.add(exit_index, 3 * durations.seconds[exit_index])
    assert durations.to(1) == 6.0
    assert durations.last_exit(6.0) == 1
