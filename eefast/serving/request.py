"""One image that waits or is under way: what answers it, by which limits, until when; answered exactly once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from math import inf

from torch import Tensor

from ..engines import Engine
from .answer import Answer


class Pending(Future[Answer]):
    """cancelled_once: is called when it was cancelled, if it was put somewhere that wants to know."""

    cancelled_once: Callable[[], None] | None = None

    def cancel(self) -> bool:
        cancelled = super().cancel()
        if cancelled and self.cancelled_once is not None:
            self.cancelled_once()
        return cancelled


class Request:
    """engine: of the moment of `submit`. image: prepared, [1, C, H, W].

    limits: [n] or [n, 1] float32, see `eefast.profiles`. values: the same as numbers, where they are read one by one.
    arrived, began: seconds on the server's clock. deadline: on the same clock, infinite where there is none.
    future: pending until it has an answer or an error, so that it can be cancelled at any time.
    """

    __slots__ = ("arrived", "began", "deadline", "engine", "future", "image", "limits", "values")

    def __init__(self, engine: Engine, image: Tensor, limits: Tensor, arrived: float, deadline: float = inf) -> None:
        self.engine, self.image, self.limits = engine, image, limits
        self.arrived, self.deadline, self.began = arrived, deadline, arrived
        self.future = Pending()
        self.values: list[float] = []

    @property
    def urgent(self) -> bool:
        return self.deadline != inf

    def alike(self, other: Request) -> bool:
        """Whether both can be in one batch."""
        return (
            self.engine is other.engine
            and self.image.shape == other.image.shape
            and self.image.dtype == other.image.dtype
        )

    def answer(self, logits: Tensor, label: int, exit_index: int, confidence: float, cost: float, now: float) -> None:
        """logits: [K]; now: on the server's clock."""
        waited, computed = self.began - self.arrived, now - self.began
        with suppress(InvalidStateError):  # cancelled meanwhile
            self.future.set_result(
                Answer(label, logits, exit_index, confidence, cost, waited, computed, now > self.deadline)
            )

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            self.future.set_exception(error)
