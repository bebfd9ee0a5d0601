"""Images for loops in C++: which engines have them, images of other sizes, engines that follow, ends, refusals."""

import time
from math import inf

import pytest
import torch
from networks import images, lived_in

import eefast
from eefast.ops.resident_loop import available
from eefast.serving import Closed, Overloaded
from eefast.serving.native_line import NativeLine, runs
from eefast.serving.request import Request

pytestmark = pytest.mark.skipif(not available, reason="loops are C++ threads")


@pytest.fixture
def line_of():
    """Lines that end with their test."""
    made = []

    def make(engine, most=256, workers=1):
        made.append(NativeLine(most, engine, workers))
        return made[-1]

    yield make
    for line in made:
        ended(line)


def ended(line):
    line.close()
    line.drop()
    for thread in line.threads:
        thread.join(20)
        assert not thread.is_alive()


def requests(engine, x, limits, deadline=inf):
    return [Request(engine, image, limits, time.perf_counter(), deadline) for image in x.split(1)]


def answers(given):
    return [request.future.result(20) for request in given]


def test_only_the_resident_engine_on_a_cpu_with_the_clock_of_the_loop(small):
    assert runs(eefast.accelerate(small[0], engine="resident").engine, time.perf_counter)
    assert not runs(eefast.accelerate(small[0], engine="resident").engine, time.monotonic)
    assert not runs(eefast.accelerate(small[0], engine="compact").engine, time.perf_counter)


def test_images_of_several_sizes(resident, line_of):
    """Alike or not, in one call of `put`, and in turn."""
    engine, limits, x = resident
    line = line_of(engine)
    sizes = [x[:3], images(2, (3, 16, 16)), images(2, (3, 14, 10)), x[3:5]]
    for _ in range(2):
        given = [request for part in sizes for request in requests(engine, part, limits)]
        line.put(given)
        expected = torch.cat([engine.run(part, limits).logits for part in sizes])
        assert torch.equal(torch.stack([answer.logits for answer in answers(given)]), expected)


def test_engines_follow_one_another_and_nothing_is_lost(resident, line_of):
    engine, limits, x = resident
    other = eefast.accelerate(
        lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), num_classes=5), 4), engine="resident"
    ).engine
    line, given = line_of(engine), []
    for one in (engine, other, engine):
        given.append(requests(one, x, limits))
        line.put(given[-1])
    for one, part in zip((engine, other, engine), given, strict=True):
        assert torch.equal(torch.stack([answer.logits for answer in answers(part)]), one.run(x, limits).logits)
    assert sum(line.running().values()) == len(line) == 0


def test_a_rule_that_changes_answers_the_next_image(line_of):
    net = lived_in(eefast.zoo.eenet("eenet8", 2, input_shape=(3, 12, 12), num_classes=5), 3).with_criterion("patience")
    engine, x, limits = eefast.accelerate(net, engine="resident").engine, images(7, (3, 12, 12)), torch.full((2,), 0.5)
    line = line_of(engine)
    for _ in range(2):
        given = requests(engine, x, limits)
        line.put(given)
        found, expected = answers(given), engine.run(x, limits)
        assert [answer.confidence for answer in found] == expected.confidence.tolist()
        net.rule[:, 5] += 0.25  # the bias of what is carried


def test_an_answer_has_its_times_and_says_whether_it_is_late(resident, line_of):
    engine, limits, x = resident
    line = line_of(engine)
    given = requests(engine, x[:1], limits, 0.0) + requests(engine, x[:1], limits, time.perf_counter() + 1000)
    for request in given:
        line.put([request])
    late, early = answers(given)
    assert (late.late, late.exit) == (True, 0)
    assert (early.late, early.exit) == (False, int(engine.run(x[:1], limits).exit_index))
    assert early.cost == engine.net.cost[early.exit]
    assert min(early.waited, early.computed) > 0


def test_no_more_wait_than_may(resident, line_of):
    engine, limits, x = resident
    line, given = line_of(engine, 31), []
    with pytest.raises(Overloaded, match="0 images wait, max_queue=31 may; send 62 again later"):
        line.put(requests(engine, x.repeat(2, 1, 1, 1), limits))
    refused = 0
    for _ in range(50):
        part = requests(engine, x, limits)
        try:
            line.put(part)
            given += part
        except Overloaded:
            refused += 1
        assert len(line) <= 31
    assert len(answers(given)) == 31 * (50 - refused) > 0


def test_cancelled_images_are_never_answered_and_leave_nothing(resident, line_of):
    engine, limits, x = resident
    line, given = line_of(engine), requests(engine, x.repeat(5, 1, 1, 1), limits)
    line.put(given)
    gone = [request.future.cancel() for request in reversed(given)]
    assert all(request.future.done() or not was for request, was in zip(reversed(given), gone, strict=True))
    others = requests(engine, x[:1], limits)
    line.put(others)
    answers(others)
    ended(line)
    assert all(request.future.done() for request in given)


def test_what_waits_at_the_end_fails(resident, line_of):
    engine, limits, x = resident
    line, given = line_of(engine), requests(engine, x.repeat(5, 1, 1, 1), limits)
    line.put(given)
    ended(line)
    with pytest.raises(Closed, match="make another one"):
        line.put(requests(engine, x[:1], limits))
    found = [request.future.exception(0) for request in given]
    assert all(error is None or isinstance(error, Closed) for error in found)
