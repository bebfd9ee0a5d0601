"""The resident engine → pieces of its run, a few stages each, after which other images may go first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import nan

import torch
from torch import Tensor

from .. import criteria
from ..engines import Engine, ResidentEngine
from .durations import CallDurations

SHARE = 2
"""No piece but a single stage takes more than the largest stage's part of the cost ÷ this: what arrives waits for a
piece, and every piece costs a call."""

REPETITIONS = 3


class Piece:
    """Stages first … last of an engine's run, of any number of threads at a time.

    final: whether it ends at the final exit. exits: number of early exits among its stages. costs: of all exits of the
    network. durations: of calls on one image, from the start of the piece to each of its exits.
    """

    def __init__(self, engine: ResidentEngine, first: int, last: int) -> None:
        self.engine, self.first, self.last = engine, first, last
        self.costs: list[float] = engine.net.cost.tolist()
        self.final = last == engine.net.num_exits
        self.exits = last - first + (not self.final)
        self.durations = CallDurations([1e-9] * (last - first + 1))

    def takes(self, image: Tensor) -> bool:
        """Whether the first piece takes it: a float image may hold NaN, for which a network of integers has none."""
        return self.engine.program.image is None or not image.is_floating_point()

    def run(self, x: Tensor, limits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `ResidentEngine.run_part`; on the calling thread alone. limits: of the early exits first … last."""
        return self.engine.run_part(x, limits, self.first, self.last, 1)


@torch.no_grad()
def measure(pieces: Sequence[Piece], clock: Callable[[], float]) -> None:
    """Sets the durations of all pieces of a run, each on what the one before it hands on."""
    engine = pieces[0].engine
    never = criteria.get(engine.plan.criterion).never
    dtype = torch.float32 if engine.program.image is None else torch.uint8
    x: Tensor | None = torch.zeros(1, *engine.net.input_shape, dtype=dtype)
    for piece in pieces:
        assert x is not None
        seconds, features = list[float](), None
        for last in range(piece.last - piece.first + 1):
            # After the last one, where there is another piece, the image goes on, so that there are features for it.
            passed = min(last + (last == piece.last - piece.first), piece.exits)
            limits, spans = torch.tensor([never] * passed + [nan] * (piece.exits - passed))[:, None], list[float]()
            for _ in range(REPETITIONS):
                begin = clock()
                *_, features = piece.run(x, limits)
                spans.append(clock() - begin)
            seconds.append(max(statistics.median(spans), 1e-9))
        piece.durations, x = CallDurations(seconds), features


def cuts(engine: Engine) -> list[tuple[int, int]]:
    """The first and the last stage of every piece; one pair for an engine that cannot stop between exits.

    The first piece is the first stage alone, where the engine can stop after it.
    """
    count = engine.net.num_exits
    if not isinstance(engine, ResidentEngine) or engine.plan.device.type == "cuda" or engine.criterion.carries:
        return [(0, count)]
    costs = [0.0, *engine.net.cost.tolist()]
    return pieces_of([after - before for before, after in pairwise(costs)], stops(engine))


def stops(engine: ResidentEngine) -> list[int]:
    """The early exits after which a run of the engine can stop."""
    found = []
    for i in range(engine.net.num_exits):
        try:
            engine.program_part(0, i)
        except ValueError:
            continue
        found.append(i)
    return found


def pieces_of(costs: Sequence[float], stops: Sequence[int]) -> list[tuple[int, int]]:
    """costs: of every stage. stops: where a piece may end, ascending."""
    most, found, first = max(costs) / SHARE, list[tuple[int, int]](), 0
    ends = [*stops, len(costs) - 1]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or first == 0 or sum(costs[first : following + 1]) > most:
            found.append((first, end))
            first = end + 1
    return found
