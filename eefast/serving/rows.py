"""Waiting images → rows that go through the stages together, each answered at its exit; arrivals join the first."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import nan

import torch
from torch import Tensor

from ..engines import Engine
from .answer import Closed
from .calls import answer_in_one_call, seconds_to_exits
from .durations import Usual
from .request import Request
from .stage_order import next_stage
from .stages import StageCall, stage_calls
from .waiting_line import WaitingLine

MOST, MOST_ON_CUDA = 32, 256
"""Rows of a launch: an arrival waits for one launch at most."""

LAUNCHES_UNDER_WAY = 4
"""Rows that have begun and have not exited, in launches: more wait in the line, which is bounded."""


class Row:
    """A request that has begun. features: [1, C, H, W], before its next stage; exited: when it was at its last exit."""

    __slots__ = ("exited", "features", "request")

    def __init__(self, request: Request, features: Tensor, exited: float) -> None:
        self.request, self.features, self.exited = request, features, exited


class Rows:
    """One thread runs `work`. engine: that the rows under way belong to; others begin when all of them have exited.

    launches: (stage, rows) of the last ones, the newest at the end.
    """

    workers = 1

    def __init__(self, line: WaitingLine, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.line, self.clock = line, clock
        self.launches: deque[tuple[int, int]] = deque(maxlen=1024)
        self._count, self._first_ran_last, self._dropped = 0, False, False
        reached = [0.0, *seconds_to_exits(engine, clock)]
        spans = [max(b - a, 0.0) for a, b in pairwise(reached)]
        # Seconds of a launch of each stage, and from the exit before it to its exit.
        self._running, self._reaching = [Usual(s) for s in spans], [Usual(s) for s in spans]
        self._use(engine)

    def _use(self, engine: Engine) -> None:
        self.engine, stages = engine, stage_calls(engine)
        self.stages: Sequence[StageCall] = stages or ()
        self.costs = engine.net.cost.tolist()
        self.most = MOST_ON_CUDA if engine.plan.device.type == "cuda" else MOST
        self._waiting: list[deque[Row]] = [deque() for _ in self.costs]
        self._since: list[int | None] = [None for _ in self.costs]

    def running(self) -> dict[str, int]:
        """Number of rows that wait before each stage but the first, in which no row waits."""
        return {str(i): len(rows) for i, rows in enumerate(self._waiting) if i}

    def drop(self) -> None:
        """What is under way fails at the next launch; `work` returns when the line is empty, too."""
        self._dropped = True

    @torch.no_grad()
    def work(self) -> None:
        """Until the line is closed and all is answered."""
        while True:
            under_way = sum(map(len, self._waiting))
            if under_way and self._dropped:
                self._fail_all()
            elif not under_way:
                if not (arrived := self.line.take(self.most, _alike)):
                    return
                self._begin(arrived)
            else:
                self._go_on(under_way)

    def _go_on(self, under_way: int) -> None:
        arrivals = len(self.line) if under_way < LAUNCHES_UNDER_WAY * self.most else 0
        stage = next_stage(arrivals, self._since, self._first_ran_last)
        if stage == 0:
            same = lambda taken, request: request.engine is self.engine and _alike(taken, request)  # noqa: E731
            if arrived := self.line.take(self.most, same, wait=False):
                self._begin(arrived)
                return
            stage = next_stage(0, self._since, False)
        assert stage is not None
        self._launch(stage, self._next_rows(stage))

    def _begin(self, arrived: Sequence[Request]) -> None:
        now = self.clock()
        for request in arrived:
            request.began = now
        if arrived[0].engine is not self.engine:
            self._use(arrived[0].engine)
        if not self.stages:
            answer_in_one_call(arrived, self.clock)
            return
        for request in arrived:
            request.values = request.limits.flatten().tolist()
        self._launch(0, [Row(request, request.image, now) for request in arrived])

    def _next_rows(self, stage: int) -> list[Row]:
        """The oldest before a stage that are of one shape; those that were cancelled are dropped."""
        waiting, found = self._waiting[stage], list[Row]()
        while waiting and len(found) < self.most:
            if found and waiting[0].features.shape != found[0].features.shape:
                break
            row = waiting.popleft()
            if not row.request.future.cancelled():
                found.append(row)
        self._since[stage] = self._count if waiting else None
        return found

    def _launch(self, stage: int, rows: Sequence[Row]) -> None:
        """A stage and its exit on some rows; those that exit are answered, the others wait before the next stage."""
        if not rows:
            return
        begin = self.clock()
        self._count += 1
        self._first_ran_last = stage == 0
        self.launches.append((stage, len(rows)))
        try:
            features = rows[0].features if len(rows) == 1 else torch.cat([row.features for row in rows])
            limits = [self._limit(stage, row, begin) for row in rows]
            result = self.stages[stage](features, torch.tensor(limits, dtype=torch.float32, device=features.device))
            survives = set(result.survivors)
            exits = [i for i in range(len(rows)) if i not in survives]
            logits = result.logits[exits].cpu()
            labels, confidence = logits.argmax(dim=1).tolist(), result.confidence[exits].tolist()
            kept = result.features[result.survivors].split(1) if survives else ()
        except BaseException as error:
            if len(rows) == 1:
                rows[0].request.fail(error)
            else:  # the others are answered
                for row in rows:
                    self._launch(stage, [row])
            return
        now = self.clock()
        for j, i in enumerate(exits):
            rows[i].request.answer(logits[j], labels[j], stage, confidence[j], self.costs[stage], now)
        self._running[stage].add(now - begin)
        self._reaching[stage].add(now - min(row.exited for row in rows))
        if kept:
            self._waiting[stage + 1].extend(
                Row(rows[i].request, part, now) for i, part in zip(result.survivors, kept, strict=True)
            )
            if self._since[stage + 1] is None:
                self._since[stage + 1] = self._count

    def _limit(self, stage: int, row: Row, now: float) -> float:
        """The threshold of this row here; NaN where the exit after this one would be too late."""
        request = row.request
        if stage == len(self.stages) - 1:
            return 0.0
        if request.urgent:
            after = self._running[stage].value + self._reaching[stage + 1].value
            if now + after > request.deadline:
                return nan
        return request.values[stage]

    def _fail_all(self) -> None:
        for i, waiting in enumerate(self._waiting):
            for row in waiting:
                row.request.fail(Closed("the server was closed before this image was answered"))
            waiting.clear()
            self._since[i] = None


def _alike(taken: Sequence[Request], request: Request) -> bool:
    return not taken or taken[0].alike(request)
