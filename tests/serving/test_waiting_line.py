"""The line: order, bounds, shares, groups, waking and closing."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from eefast.serving import Closed, Overloaded
from eefast.serving.request import Request
from eefast.serving.waiting_line import WaitingLine


def request(name, deadline=float("inf")):
    return Request(name, torch.zeros(1, 1, 1, 1), torch.zeros(0), 0.0, deadline)


def names(requests):
    return "".join(r.engine for r in requests)


def line_of(text, most=31):
    line = WaitingLine(most)
    line.put([request(letter) for letter in text])
    return line


def test_requests_are_taken_in_their_order_and_as_many_as_asked():
    line = line_of("abcdefg")
    assert [names(line.take(3)) for _ in range(2)] == ["abc", "def"]
    assert len(line) == 1


@pytest.mark.parametrize(("share", "taken"), [(1, "abcd"), (2, "abcd"), (3, "abc"), (7, "a"), (100, "a")])
def test_a_share_of_what_waits_is_left_to_others(share, taken):
    assert names(line_of("abcdefg").take(4, share=share)) == taken


def test_only_what_fits_is_taken_together():
    line = line_of("aabba")
    fits = lambda taken, r: not taken or taken[0].engine == r.engine  # noqa: E731
    assert [names(line.take(4, fits)) for _ in range(3)] == ["aa", "bb", "a"]
    line.put([request("c")])
    assert line.take(4, lambda taken, r: False, wait=False) == []
    assert names(line.take(4)) == "c"


def test_too_many_are_refused_whole_and_cancelled_ones_make_room():
    line = line_of("abc", 4)
    with pytest.raises(Overloaded, match="3 images wait, max_queue=4 may; send 2 again"):
        line.put([request("d"), request("e")])
    assert len(line) == 3
    more = request("d")
    line.put([more])
    more.future.cancel()
    line.put([request("e")])
    assert names(line.take(9)) == "abce"


def test_what_was_cancelled_is_not_taken():
    line = WaitingLine(4)
    requests = [request(letter) for letter in "abcd"]
    line.put(requests)
    for r in (requests[0], requests[2]):
        r.future.cancel()
    assert names(line.take(9)) == "bd"


def test_a_closed_line_gives_what_it_has_then_nothing():
    line = line_of("ab")
    line.close()
    with pytest.raises(Closed):
        line.put([request("c")])
    assert names(line.take(1)) == "a"
    assert names(line.drop()) == "b"
    assert line.take(1) == []


def test_every_request_is_taken_once_by_threads_that_wait():
    line = WaitingLine(10_000)

    def worker():
        found = []
        while taken := line.take(3):
            found += taken
        return found

    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(worker) for _ in range(3)]
        requests = [request(str(i)) for i in range(2000)]
        feeders = [threading.Thread(target=lambda part=requests[i::4]: [line.put([r]) for r in part]) for i in range(4)]
        for feeder in feeders:
            feeder.start()
        for feeder in feeders:
            feeder.join()
        line.close()
        found = [r for result in results for r in result.result(20)]
    assert sorted(map(id, found)) == sorted(map(id, requests))


def test_deadlines_are_those_of_the_oldest():
    line = WaitingLine(9)
    line.put([request("a", 3.0), request("b"), request("c", 1.0)])
    assert line.deadlines(2) == [3.0, float("inf")]
