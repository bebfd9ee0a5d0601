"""Images on their way through the pieces of the resident engine's run: order, company, deadlines, failures."""

from itertools import cycle
from math import inf, nan

import pytest
import torch

from eefast.serving import resident_rows
from eefast.serving.pieces import Piece
from eefast.serving.request import Request
from eefast.serving.resident_rows import MOST, ResidentRows, limits_of
from eefast.serving.waiting_line import WaitingLine


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Crew:
    """One that works on one thread, a second for every stage of every image.

    seen: (first stage, images) of each call. came: futures of those that arrived meanwhile. hook: called after a call.
    """

    def __init__(self, monkeypatch, engine, limits, x, workers=1, cuts=((0, 0), (1, 1), (2, 2))):
        self.clock, self.seen, self.came, self.run = Clock(), [], [], Piece.run
        self.engine, self.limits, self.x = engine, limits, x
        self.arrivals, self.hook = {}, lambda: None
        monkeypatch.setattr(Piece, "run", lambda piece, x, limits: self.slow(piece, x, limits))
        monkeypatch.setattr(resident_rows, "cuts", lambda engine: list(cuts))
        self.crew = ResidentRows(WaitingLine(256), engine, workers, self.clock)
        self.clock.now = 0.0
        self.seen.clear()

    def slow(self, piece, x, limits):
        found = self.run(piece, x, limits)
        self.clock.now += float((found[2].clamp(max=piece.last - piece.first) + 1).sum())
        self.seen.append((piece.first, len(x)))
        self.hook()
        if arrival := self.arrivals.pop(len(self.seen), None):
            self.came += self.put(*arrival)
            self._close()
        return found

    def put(self, count=1, exit_index=None, deadline=inf):
        """exit_index: where they exit, by default by the network's thresholds."""
        given = self.limits
        if exit_index is not None:
            given = torch.tensor([[2.0]] * exit_index + [[nan]] * (2 - exit_index))
        images = cycle(self.x.split(1))
        requests = [Request(self.engine, next(images), given, self.clock.now, deadline) for _ in range(count)]
        self.crew.line.put(requests)
        return [request.future for request in requests]

    def work(self, **arrivals):
        """arrivals: what is `put` while the call of this number runs."""
        self.arrivals = {int(number[1:]): arrival for number, arrival in arrivals.items()}
        self._close()
        self.crew.work()

    def _close(self):
        if not self.arrivals:
            self.crew.line.close()


@pytest.fixture
def crew(resident, monkeypatch):
    return Crew(monkeypatch, *resident)


def test_all_are_answered_as_in_a_batch(crew, resident):
    engine, limits, x = resident
    futures = crew.put(31)
    crew.work()
    expected, answers = engine.run(x, limits), [future.result(0) for future in futures]
    assert [a.exit for a in answers] == expected.exit_index.tolist()
    assert set(expected.exit_index.tolist()) == {0, 1, 2}
    assert torch.equal(torch.stack([a.logits for a in answers]), expected.logits)
    assert [a.confidence for a in answers] == expected.confidence.tolist()
    assert [a.label for a in answers] == expected.labels.tolist()
    assert torch.equal(torch.tensor([a.cost for a in answers]), expected.cost)
    assert set(crew.crew.running().values()) == {0}


def test_pieces_of_several_stages_give_the_same_answers(resident, monkeypatch):
    engine, limits, x = resident
    for made in ([(0, 1), (2, 2)], [(0, 0), (1, 2)]):
        monkeypatch.setattr(resident_rows, "cuts", lambda engine, made=made: made)
        crew = ResidentRows(WaitingLine(256), engine, 2)
        given = [limits, torch.tensor([[2.0], [nan]]), torch.tensor([-1.0, -1.0]), limits.clone()]
        requests = [Request(engine, x[i : i + 1], given[i % 4], 0.0) for i in range(31)]
        crew.line.put(requests)
        crew.line.close()
        crew.work()
        for i, request in enumerate(requests):
            answer, alone = request.future.result(0), engine.run(x[i : i + 1], given[i % 4])
            assert answer.exit == int(alone.exit_index)
            assert torch.equal(answer.logits, alone.logits[0])


@pytest.mark.parametrize("number", [1, 2])
def test_an_easy_image_waits_for_one_piece_of_a_hard_one_at_most(crew, number):
    (hard,), done = crew.put(1, 2), []
    crew.hook = lambda: done.append([future.done() for future in (hard, *crew.came)])
    crew.work(**{f"_{number}": (1, 0)})
    assert crew.seen == [(0, 1), (1, 1), (0, 1), (2, 1)]
    assert done[-1] == [False, True]  # when the last piece has run


def test_arrivals_and_later_pieces_take_turns_and_the_oldest_goes_first(crew):
    crew.put(1, 2)
    crew.work(_1=(1, 2), _2=(1, 2), _3=(1, 2))
    assert crew.seen == [(0, 1), (1, 1), (0, 2), (2, 1), (0, 1), (1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("count", "workers", "sizes"),
    [(1, 1, [1]), (9, 1, [8, 1]), (5, 2, [3, 1, 1]), (31, 2, [8, 8, 8, 4, 2, 1]), (9, 9, [1] * 9)],
)
def test_as_many_together_as_leave_a_share_to_the_other_workers(resident, monkeypatch, count, workers, sizes):
    crew = Crew(monkeypatch, *resident, workers)
    crew.put(count, 0)
    crew.work()
    assert crew.seen == [(0, size) for size in sizes]
    assert max(sizes) <= MOST


def test_no_more_images_begin_than_may_be_under_way(crew):
    futures = crew.put(100, 2)
    crew.work()
    assert all(future.result(0).exit == 2 for future in futures)
    under_way = 0
    for first, count in crew.seen:
        under_way += {0: count, 1: 0, 2: -count}[first]
        assert under_way < resident_rows.CALLS_UNDER_WAY * MOST + MOST


@pytest.mark.parametrize(
    ("deadline", "exit_index", "late", "calls"),
    [(3.0, 2, False, 3), (2.9, 1, False, 2), (1.9, 0, False, 1), (0.5, 0, True, 1)],
)
def test_an_image_exits_at_the_last_exit_before_its_deadline(crew, deadline, exit_index, late, calls):
    (future,) = crew.put(1, 2, deadline)
    crew.work()
    answer = future.result(0)
    assert (answer.exit, answer.late, len(crew.seen)) == (exit_index, late, calls)


@pytest.mark.parametrize(("deadline", "exit_index"), [(3.0, 2), (2.9, 1), (1.9, 0)])
def test_an_image_in_a_piece_of_several_stages_exits_in_time(resident, monkeypatch, deadline, exit_index):
    crew = Crew(monkeypatch, *resident, cuts=[(0, 2)])
    (future,) = crew.put(1, 2, deadline)
    crew.work()
    assert (future.result(0).exit, crew.clock.now) == (exit_index, exit_index + 1.0)


def test_an_image_that_waits_too_long_for_its_next_piece_gets_the_answer_that_it_has(crew):
    """It has passed its first exit when an older one takes the second that it would need for the next."""
    crew.put(1, 2)
    crew.work(_1=(1, 2, 4.5))
    answer = crew.came[0].result(0)
    assert crew.seen == [(0, 1), (1, 1), (0, 1), (2, 1)]
    assert (answer.exit, answer.late, answer.waited, answer.computed) == (0, False, 1.0, 2.0)
    expected = crew.engine.run(crew.x[:1], torch.full((2, 1), nan))
    assert torch.equal(answer.logits, expected.logits[0])
    assert (answer.label, answer.confidence) == (int(expected.labels), float(expected.confidence))


def test_time_is_left_for_the_deadlines_of_those_that_wait(crew):
    """Three seconds each would be too much for the last ones; all are in time by taking earlier exits."""
    futures = crew.put(4, 2, 5.0)
    crew.work()
    answers = [future.result(0) for future in futures]
    assert not any(a.late for a in answers)
    assert sum(a.exit + 1 for a in answers) == 5


@pytest.mark.parametrize(("count", "exits"), [(1, [1]), (2, [0, 0])])
def test_short_deadlines_leave_time_for_images_that_will_come(crew, count, exits):
    """A second stage would keep one that comes meanwhile from its first exit; nothing comes where there is one."""
    futures = crew.put(count, 2, 2.9)
    crew.work()
    assert [future.result(0).exit for future in futures] == exits


def test_cancelled_images_are_computed_no_further(crew):
    futures = crew.put(2, 2)
    crew.hook = futures[0].cancel
    crew.work()
    assert futures[1].result(0).exit == 2
    assert crew.seen == [(0, 2), (1, 1), (2, 1)]


def test_an_image_that_fails_fails_alone(crew, monkeypatch):
    slow = Crew.slow

    def fails(self, piece, x, limits):
        if piece.first == 0 and (x[:, 0, 0, 0] == 7.0).any():
            raise ArithmeticError("of this image")
        return slow(self, piece, x, limits)

    monkeypatch.setattr(Crew, "slow", fails)
    crew.x = crew.x[:3].clone()
    crew.x[1, 0, 0, 0] = 7.0
    futures = crew.put(3)
    crew.work()
    with pytest.raises(ArithmeticError):
        futures[1].result(0)
    expected = crew.engine.run(crew.x, crew.limits).exit_index
    assert [futures[i].result(0).exit for i in (0, 2)] == [int(expected[i]) for i in (0, 2)]
    assert set(crew.crew.running().values()) == {0}


def test_limits_of_rows_that_share_them_and_of_others(resident):
    engine, _, x = resident

    def row(limits):
        return resident_rows.Row(Request(engine, x[:1], limits, 0.0), 0)

    shared, other = torch.tensor([0.1, 0.2]), torch.tensor([[0.3], [nan]])
    assert limits_of([row(shared)], 1, 1, None).numel() == 0
    assert torch.equal(limits_of([row(shared)] * 2, 0, 2, None), shared)
    assert torch.equal(limits_of([row(shared), row(other)], 0, 1, None), torch.tensor([[0.1, 0.3]]))
    cut = limits_of([row(shared)], 0, 2, 1)
    assert cut[0].item() == shared[0].item()
    assert cut[1].isnan().all()
    assert not shared.isnan().any()
