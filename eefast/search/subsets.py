"""Candidates and a rule → right answers and mean cost of any subset at every level, counted in bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..thresholds.cuts import Cuts
from .candidates import Candidates, Subset
from .levels import level_picks

Array = np.ndarray[Any, Any]


class State(NamedTuple):
    """After some exits, at T levels: bits of the samples that go on [T, W], their number, right answers, costs [T]."""

    stay: Array
    left: Array
    right: Array
    cost: Array


class Totals:
    """The totals of subsets of `candidates` under the exit rule `criterion`.

    Early exits have the cuts of one of T levels, `picks`; costs are sums over all samples, relative to the network
    without exits, with all heads on the way.
    """

    def __init__(self, candidates: Candidates, criterion: str) -> None:
        every = tuple(range(len(candidates.place)))
        stages = np.cumsum([cost.stage_macs for cost in candidates.costs])
        heads, final = [cost.head_macs for cost in candidates.costs], candidates.costs[-1]
        whole = stages[-1] + final.head_macs - final.num_features
        self.reach, self.heads = stages / whole, np.array(heads) / whole
        self.cuts = Cuts(candidates.outputs, candidates.labels, torch.tensor(self.reach + self.heads), criterion)
        self.picks = level_picks(self.cuts, torch.tensor(self.reach + self.heads))
        self.candidates, samples, levels = candidates, self.cuts.num_samples, len(self.picks)
        exits = [
            _bits(torch.stack([self.cuts.rank[e] < self.cuts.sizes[e][pick] for pick in self.picks[:, e]]))
            for e in every
        ]
        self.exits, self.others = exits, [~there for there in exits]
        self.right = _bits(self.cuts.outcome[:, 0] > 0)
        zeros = np.zeros(levels)
        everyone = _bits(torch.ones(levels, samples, dtype=torch.bool))
        self.start = State(everyone, zeros + samples, zeros, zeros)

    def after(self, state: State, e: int) -> State:
        """The state after candidate e, which every sample of `state` reaches."""
        going = state.stay & self.exits[e]
        gone = _count(going)
        return State(
            state.stay & self.others[e],
            state.left - gone,
            state.right + _count(going & self.right[e]),
            state.cost + state.left * self.heads[e] + gone * self.reach[e],
        )

    def end(self, state: State) -> tuple[Array, Array]:
        """Right answers [T] and sum of costs [T] where the final exit answers all others."""
        right = state.right + _count(state.stay & self.right[-1])
        return right, state.cost + state.left * (self.reach[-1] + self.heads[-1])

    def of(self, subset: Subset) -> tuple[Array, Array]:
        """Right answers [T] and sum of costs [T]."""
        state = self.start
        for e in subset:
            state = self.after(state, e)
        return self.end(state)

    def of_all(self) -> Iterator[tuple[Subset, Array, Array]]:
        """Every subset with its right answers [T] and sum of costs [T]; what subsets begin with is computed once."""
        places = self.candidates.by_place

        def walk(place: int, subset: Subset, state: State) -> Iterator[tuple[Subset, Array, Array]]:
            if place == len(places):
                yield subset, *self.end(state)
                return
            yield from walk(place + 1, subset, state)
            for e in places[place]:
                yield from walk(place + 1, (*subset, e), self.after(state, e))

        return walk(0, (), self.start)

    def thresholds(self, subset: Subset, level: int) -> tuple[float, ...]:
        return tuple(float(self.cuts.thresholds[e][self.picks[level, e]]) for e in subset)


def _bits(flags: Tensor) -> Array:
    """[rows, N] bool → [rows, N / 64, rounded up] uint64; bits past N are 0."""
    packed = np.packbits(flags.numpy(), axis=1)
    return np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)


# Of NumPy 2; before, a table of bytes.
_BYTES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)


def _count(bits: Array) -> Array:
    """[T] number of bits that are set."""
    ones = np.bitwise_count(bits) if hasattr(np, "bitwise_count") else _BYTES[bits.view(np.uint8)]
    return ones.sum(axis=1, dtype=np.int64)
