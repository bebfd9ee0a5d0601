"""Calls of the engine on what waits: how many images together, limits of each, deadlines."""

from math import nan

import pytest
import torch

from eefast.serving import calls
from eefast.serving.calls import MOST, Calls, call, seconds_to_exits
from eefast.serving.request import Request
from eefast.serving.waiting_line import WaitingLine


class Clock:
    """Goes on by a second for each exit that an image passes, and itself."""

    now = 0.0

    def __call__(self):
        return self.now


def crew_of(engine, monkeypatch, workers=2):
    """Calls that take a second for each exit passed, and the images and exits of each call."""
    clock, seen, run = Clock(), [], calls.run

    def slow(engine, images, limits):
        result = run(engine, images, limits)
        clock.now += float((result[2] + 1).sum())
        seen.append((len(images), result[2].tolist()))
        return result

    monkeypatch.setattr(calls, "run", slow)
    crew = Calls(WaitingLine(256), engine, workers, clock)
    clock.now = 0.0
    seen.clear()
    return crew, clock, seen


def work(crew):
    crew.line.close()
    crew.work()


def test_seconds_to_exits_are_those_of_forced_exits(resident, monkeypatch):
    crew, _, _ = crew_of(resident[0], monkeypatch)
    assert crew.durations.seconds == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (2, [1, 1]), (5, [3, 1, 1]), (31, [4] * 7 + [2, 1])])
def test_a_long_queue_is_taken_several_at_a_time(resident, monkeypatch, count, sizes):
    engine, limits, x = resident
    crew, _, seen = crew_of(engine, monkeypatch)
    requests = [Request(engine, x[i : i + 1], limits, 0.0) for i in range(count)]
    crew.line.put(requests)
    work(crew)
    assert [n for n, _ in seen] == sizes
    assert max(sizes) <= MOST
    expected = engine.run(x[:count], limits)
    answers = [request.future.result(0) for request in requests]
    assert [a.exit for a in answers] == expected.exit_index.tolist()
    assert torch.equal(torch.stack([a.logits for a in answers]), expected.logits)


def test_images_with_limits_of_their_own_share_a_call(resident):
    engine, limits, x = resident
    given = [limits, torch.tensor([[2.0], [nan]]), torch.tensor([-1.0, -1.0]), limits.clone()]
    logits, _, exits = call([Request(engine, x[i : i + 1], rows, 0.0) for i, rows in enumerate(given)])
    alone = [engine.run(x[i : i + 1], rows) for i, rows in enumerate(given)]
    assert torch.equal(logits, torch.cat([one.logits for one in alone]))
    assert exits.tolist()[1:3] == [1, 0]
    first = call([Request(engine, x[i : i + 1], rows, 0.0) for i, rows in enumerate(given)], 0)
    assert first[2].tolist() == [0, 0, 0, 0]
    assert not limits.isnan().any()


@pytest.mark.parametrize(("deadline", "exit_index", "late"), [(3.0, 2, False), (2.9, 1, False), (0.5, 0, True)])
def test_an_image_exits_at_the_last_exit_before_its_deadline(resident, monkeypatch, deadline, exit_index, late):
    engine, limits, x = resident
    crew, _, _ = crew_of(engine, monkeypatch)
    request = Request(engine, x[:1], torch.full_like(limits, 2.0), 0.0, deadline)
    crew.line.put([request])
    work(crew)
    answer = request.future.result(0)
    assert (answer.exit, answer.late) == (exit_index, late)


def test_time_is_left_for_the_deadlines_of_those_that_wait(resident, monkeypatch):
    engine, limits, x = resident
    crew, _, seen = crew_of(engine, monkeypatch, workers=1)
    # Three seconds each would be too much for the last one; all are in time by taking earlier exits.
    requests = [Request(engine, x[i : i + 1], torch.full_like(limits, 2.0), 0.0, 5.0) for i in range(4)]
    crew.line.put(requests)
    work(crew)
    answers = [request.future.result(0) for request in requests]
    assert [n for n, _ in seen] == [1, 1, 1, 1]
    assert not any(a.late for a in answers)
    assert sum(a.exit + 1 for a in answers) == 5


def test_a_call_that_fails_is_made_for_each_image_alone(resident, monkeypatch):
    engine, limits, x = resident
    crew, _, seen = crew_of(engine, monkeypatch, workers=1)
    run = calls.run

    def fails(engine, images, limits):
        if (images[:, 0, 0, 0] == 7.0).any():
            raise ArithmeticError("of this image")
        return run(engine, images, limits)

    monkeypatch.setattr(calls, "run", fails)
    bad = x[:1].clone()
    bad[0, 0, 0, 0] = 7.0
    requests = [Request(engine, image, limits, 0.0) for image in (x[1:2], bad, x[2:3])]
    crew.line.put(requests)
    work(crew)
    assert [n for n, _ in seen] == [1, 1]
    with pytest.raises(ArithmeticError):
        requests[1].future.result(0)
    assert requests[2].future.result(0).exit == int(engine.run(x[2:3], limits).exit_index)
    assert crew.running() == {"all": 0}


def test_seconds_are_never_zero(resident):
    assert min(seconds_to_exits(resident[0], lambda: 0.0)) > 0
