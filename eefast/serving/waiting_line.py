"""Requests of any thread → the threads that answer them, in the order of arrival; refused where too many wait."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from math import ceil

from .answer import Closed, Overloaded
from .request import Request

Fits = Callable[[Sequence[Request], Request], bool]
"""(taken so far, the next one) → whether it may be taken with them."""


def any_request(taken: Sequence[Request], request: Request) -> bool:
    return True


class WaitingLine:
    """most: requests that may wait. hurried: whether one with a deadline may be among them.

    lock: guards all, can be taken again by the thread that has it. changed: of that lock, told of requests and the end.
    """

    copies = False
    """Whether `put` copies the images."""

    def __init__(self, most: int) -> None:
        self.most, self.closed, self.hurried = most, False, False
        self._waiting: deque[Request] = deque()
        self._cancelled = False
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self, count: int) -> None:
        """Raises `Overloaded` where `count` more may not wait, `Closed` where none may."""
        with self.lock:
            if self.closed:
                raise Closed("this server was closed; make another one")
            if self._cancelled and len(self._waiting) + count > self.most:
                self._cancelled = False
                self._waiting = deque(r for r in self._waiting if not r.future.cancelled())
            if len(self._waiting) + count > self.most:
                raise Overloaded(
                    f"{len(self._waiting)} images wait, max_queue={self.most} may; send {count} again later"
                )

    def put(self, requests: Sequence[Request]) -> None:
        """All of them or none; errors as of `check`."""
        with self.lock:
            self.check(len(requests))
            for request in requests:
                request.future.cancelled_once = self._has_cancelled
                self.hurried = self.hurried or request.urgent
            self._waiting.extend(requests)
            self.changed.notify(len(requests))

    def _has_cancelled(self) -> None:
        self._cancelled = True

    def take(
        self, most: int, fits: Fits = any_request, *, share: int | None = None, wait: bool = True
    ) -> list[Request]:
        """The oldest requests, `most` at most, that fit together; those that were cancelled are dropped.

        share: with it at most one in `share` of those that wait, rounded up. wait: until there is one; then an empty
            list says that the line is closed and nothing waits.
        """
        with self.lock:
            while True:
                while wait and not self._waiting and not self.closed:
                    self.changed.wait()
                if share is not None:
                    most = min(most, max(1, ceil(len(self._waiting) / share)))
                taken: list[Request] = []
                while self._waiting and len(taken) < most:
                    if self._waiting[0].future.cancelled():
                        self._waiting.popleft()
                    elif fits(taken, self._waiting[0]):
                        taken.append(self._waiting.popleft())
                    else:
                        break
                self.hurried = self.hurried and bool(self._waiting)
                if taken or self.closed or not wait:
                    return taken

    def deadlines(self, most: int) -> list[float]:
        """Those of the oldest requests, in the order of arrival; infinite where there is none."""
        with self.lock:
            return [request.deadline for request in islice(self._waiting, most)]

    def close(self) -> None:
        """No more requests; those that wait can still be taken."""
        with self.lock:
            self.closed = True
            self.changed.notify_all()

    def drop(self) -> list[Request]:
        """All that wait; they wait no longer."""
        with self.lock:
            dropped = list(self._waiting)
            self._waiting.clear()
            return dropped
