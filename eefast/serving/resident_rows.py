"""Waiting images → pieces of the resident engine's run in several threads, each image answered when it exits."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import ceil, inf, nan
from typing import NamedTuple

import torch
from torch import Tensor

from ..engines import Engine, ResidentEngine
from .calls import answer_in_one_call, together
from .pieces import Piece, cuts, measure
from .request import Request
from .stage_order import next_stage
from .waiting_line import WaitingLine

MOST = 8
"""Images of a call: few enough that none waits long for the others, enough to hide what a call costs."""

CALLS_UNDER_WAY = 4
"""Images that have begun and have not exited, in calls of every worker: more wait in the line, which is bounded."""

NONE = torch.empty(0)

SAMPLED = 8
"""Of images without a deadline one in so many is timed."""

RECENT = 8
"""Arrivals that count where the time between them is estimated."""

LOOKS_AHEAD = 64
"""Waiting images whose deadlines are looked at before a later piece may go first."""


class Row:
    """A request that has begun.

    features: [N, C, H, W] before its next piece, with those of images that ran with it; place: its row there. piece:
    the one that it waits for, -1 while it runs or after its end. number: of rows in the order in which they began.
    logits: [K], confidence, exit: of its last exit; before the first one they mean nothing.
    """

    __slots__ = ("confidence", "exit", "features", "logits", "number", "piece", "place", "request")

    def __init__(self, request: Request, number: int) -> None:
        self.request, self.number, self.piece = request, number, -1
        self.features, self.place = request.image, 0
        self.logits, self.confidence, self.exit = NONE.numpy(), nan, -1

    def answer(self, costs: Sequence[float], now: float) -> None:
        """With what its last exit said. costs: of all exits."""
        label, cost = int(self.logits.argmax()), costs[self.exit]
        self.request.answer(torch.from_numpy(self.logits), label, self.exit, self.confidence, cost, now)

    def fits(self, other: Row) -> bool:
        """Whether both can be in one call."""
        return together([self.request], other.request) and self.features.shape[1:] == other.features.shape[1:]


class Work(NamedTuple):
    """rows: to be run together, all before this piece. expired: to be answered by the exit that they passed."""

    piece: int
    rows: list[Row]
    expired: list[Row]


class ResidentRows:
    """workers: threads that run `work`, each on one core.

    An image waits before each piece. Arrivals and later pieces take turns, and of the later ones that with the oldest
    image goes first, so that an arrival waits for one piece of each worker at most. What waits and what is chosen is
    guarded by the line's lock.
    """

    def __init__(
        self, line: WaitingLine, engine: Engine, workers: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.line, self.clock = line, clock
        self.workers = workers or torch.get_num_threads()
        self._cuts = cuts(engine)
        self._known: list[tuple[Engine, list[Piece]]] = []
        self._usual = [piece.durations for piece in self._made(engine)]
        # When the last image with a deadline came, and the usual time between them.
        self._arrived, self._apart = -inf, inf
        self._waiting: list[deque[Row]] = [deque() for _ in self._cuts]
        self._expiring: list[tuple[float, int, int, Row]] = []
        self._first_ran_last, self._cancelled, self._begun, self._under_way = False, False, 0, 0

    def _made(self, engine: Engine) -> list[Piece]:
        """Of the engines that were met last; empty for one that cannot be cut as the first one was."""
        for known, pieces in self._known:
            if known is engine:
                return pieces
        made = list[Piece]()
        if cuts(engine) == self._cuts:
            assert isinstance(engine, ResidentEngine)
            made = [Piece(engine, *cut) for cut in self._cuts]
            measure(made, self.clock)
        self._known = [(engine, made), *self._known[:1]]
        return made

    def running(self) -> dict[str, int]:
        """Number of images that wait before each piece but the first, by its first stage."""
        return {str(first): len(rows) for (first, _), rows in zip(self._cuts, self._waiting, strict=True) if first}

    def drop(self) -> None:
        """Nothing: what is under way ends by itself soon."""

    @torch.no_grad()
    def work(self) -> None:
        """Until the line is closed and all is answered."""
        number, rows, survivors = 0, list[Row](), list[Row]()
        while work := self._next(number, survivors, len(rows) - len(survivors)):
            number, rows, expired = work
            for row in expired:
                row.answer(self._made(row.request.engine)[0].costs, self.clock())
            survivors = self._run(number, rows) if rows else []
            while len(survivors) == 1 and not len(self.line) and not any(self._waiting):
                number, self._first_ran_last = number + 1, False  # nothing else to choose
                survivors = self._run(number, survivors)

    def _next(self, number: int, survivors: Sequence[Row], ended: int) -> Work | None:
        """Takes back what goes on after piece `number`, and finds the next work; waits until there is some.

        ended: rows that do not go on. None when the line is closed and all is answered.
        """
        line = self.line
        with line.lock:
            self._under_way -= ended
            for row in survivors:
                self._put_back(row, number + 1)
            while True:
                expired = self._expired() if self._expiring else []
                number, rows = self._chosen()
                if rows or expired:
                    if len(line) or any(self._waiting):
                        line.changed.notify()
                    return Work(number, rows, expired)
                if line.closed and not len(line) and not self._under_way:
                    line.changed.notify_all()
                    return None
                line.changed.wait()

    def _put_back(self, row: Row, number: int) -> None:
        row.piece = number
        self._waiting[number].append(row)
        if row.request.urgent:
            until = row.request.deadline - self._usual[number].to(0)
            heappush(self._expiring, (until, row.number, number, row))

    def _expired(self) -> list[Row]:
        """Rows that wait and cannot reach another exit before their deadline; they wait no longer."""
        found = list[Row]()
        while self._expiring and self._expiring[0][0] < self.clock():
            _, _, piece, row = heappop(self._expiring)
            if row.piece == piece:
                row.piece = -1
                found.append(row)
        self._under_way -= len(found)
        return found

    def _chosen(self) -> tuple[int, list[Row]]:
        """The piece that runs next, and its rows; none where there is nothing to do."""
        waiting = self._waiting
        if self._cancelled:
            self._drop_cancelled()
        for number, rows in enumerate(waiting):
            while rows and rows[0].piece != number:  # it has expired
                rows.popleft()
        may_begin = self._under_way < CALLS_UNDER_WAY * MOST * self.workers
        arrivals = len(self.line) if may_begin else 0
        since = [rows[0].number if rows else None for rows in waiting]
        chosen = next_stage(arrivals, since, self._first_ran_last)
        if chosen and arrivals and self.line.hurried and not self._leaves_time(chosen):
            chosen = 0
        if chosen == 0:
            if taken := self.line.take(MOST, together, share=self.workers, wait=False):
                self._first_ran_last = True
                return 0, self._begin(taken)
            chosen = next_stage(0, since, False)
        if chosen is None:
            return 0, []
        self._first_ran_last = False
        return chosen, self._taken(chosen)

    def _drop_cancelled(self) -> None:
        self._cancelled = False
        for number, rows in enumerate(self._waiting):
            for row in rows:
                if row.piece == number and row.request.future.cancelled():
                    row.piece = -1
                    self._under_way -= 1

    def _has_cancelled(self) -> None:
        self._cancelled = True

    def _leaves_time(self, number: int) -> bool:
        """Whether all that wait and can still reach their first exit in time can do so after this piece, too."""
        now, first = self.clock(), self._usual[0].to(0)
        end = now + self._usual[number].to(-1)
        latest = (d - (i // self.workers + 1) * first for i, d in enumerate(self.line.deadlines(LOOKS_AHEAD)))
        return not any(now <= begin < end for begin in latest)

    def _begin(self, taken: Sequence[Request]) -> list[Row]:
        now, rows = self.clock(), []
        for request in taken:
            request.began = now
            self._begun += 1
            rows.append(Row(request, self._begun))
            if request.urgent:
                apart = request.arrived - self._arrived
                self._apart = apart if self._apart == inf else self._apart + (apart - self._apart) / RECENT
                self._arrived = request.arrived
            request.future.cancelled_once = self._has_cancelled
            if request.future.cancelled():  # before that
                self._cancelled = True
        self._under_way += len(rows)
        return rows

    def _taken(self, number: int) -> list[Row]:
        """The oldest rows before a piece that may run together."""
        waiting, rows = self._waiting[number], list[Row]()
        most = min(MOST, ceil(len(waiting) / self.workers))
        while waiting and len(rows) < most:
            row = waiting[0]
            if row.piece == number:
                if rows and not rows[0].fits(row):
                    break
                row.piece = -1
                rows.append(row)
            waiting.popleft()
        return rows

    def _run(self, number: int, rows: Sequence[Row]) -> list[Row]:
        """A piece on some rows; those that exit are answered, the others returned."""
        request = rows[0].request
        pieces = self._made(request.engine)
        if not pieces or (number == 0 and not pieces[0].takes(request.image)):
            answer_in_one_call([row.request for row in rows], self.clock)
            return []
        piece, begin = pieces[number], self.clock()
        try:
            last = piece.durations.last_exit(self._time_left(request, number, begin)) if request.urgent else None
            cut = last if last is None or last < piece.last - piece.first else None
            limits = limits_of(rows, piece.first, piece.first + piece.exits, cut)
            *answers, features = piece.run(features_of(rows), limits)
            logits, confidence = answers[0].numpy(), answers[1].tolist()
            exits = answers[2].tolist()
        except BaseException as error:
            if len(rows) == 1:
                request.fail(error)
                return []
            return [survivor for row in rows for survivor in self._run(number, [row])]  # the others are answered
        now, survivors = self.clock(), []
        for i, row in enumerate(rows):
            row.logits, row.confidence, row.exit = logits[i], confidence[i], piece.first + exits[i]
            place = exits[i] - piece.exits  # in `features`, of one that no early exit answered
            if piece.final or place < 0:
                row.answer(piece.costs, now)
                continue
            row.exit = piece.last
            if self._has_time(row.request, pieces[number + 1], now):
                assert features is not None
                row.features, row.place = features, place
                survivors.append(row)
            else:
                row.answer(piece.costs, now)
        if len(rows) == 1 and (request.urgent or rows[0].number % SAMPLED == 0):
            piece.durations.add(min(exits[0], piece.last - piece.first), now - begin)
        return survivors

    def _has_time(self, request: Request, following: Piece, now: float) -> bool:
        """For the first exit of the next piece."""
        return not request.urgent or following.durations.to(0) <= self._time_left(request, 1, now)

    def _time_left(self, request: Request, number: int, now: float) -> float:
        """Seconds that piece `number` of an image with a deadline may take.

        Where such images come more often, a later piece leaves time for those that will wait for it: to reach their
        first exit by as short a deadline, and to be taken up.
        """
        left = request.deadline - now
        if number and self._apart < (whole := request.deadline - request.arrived):
            return min(left, whole - 2 * self._usual[0].to(0))
        return left


def features_of(rows: Sequence[Row]) -> Tensor:
    """[N, C, H, W], without a copy where they are neighbours in memory."""
    first, count = rows[0], len(rows)
    if all(row.features is first.features and row.place == first.place + i for i, row in enumerate(rows)):
        return first.features if len(first.features) == count else first.features[first.place : first.place + count]
    return torch.cat([row.features[row.place : row.place + 1] for row in rows])


def limits_of(rows: Sequence[Row], first: int, last: int, cut: int | None) -> Tensor:
    """[last - first] or [last - first, N] limits of the exits first … last - 1 alone; cut: the one where all exit."""
    if first == last:
        return NONE
    all_limits = [row.request.limits for row in rows]
    limits = all_limits[0]
    if len(rows) > 1 and (limits.dim() == 2 or any(other is not limits for other in all_limits)):
        limits = torch.cat([part if part.dim() == 2 else part[:, None] for part in all_limits], dim=1)
    limits = limits[first:last]
    if cut is None or cut >= last - first:
        return limits
    limits = (limits if limits.dim() == 2 else limits[:, None]).clone()
    limits[cut:] = nan
    return limits
