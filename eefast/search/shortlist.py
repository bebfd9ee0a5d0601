"""Subsets at their levels, one after the other → the best within limits, and the front of accuracy against cost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from .candidates import Candidates, Subset
from .subsets import Array

# Points of the front: the most accurate subset in each of this many steps of cost.
STEPS = 200


@dataclass(frozen=True, order=True)
class Ranked:
    """A subset under an exit rule at one level; the larger the better: more right answers, then the lower cost."""

    right: float
    saved: float
    criterion: str
    subset: Subset
    level: int


class Shortlist:
    """The best subsets so far.

    limit: of the mean cost; most: how many to keep; samples: N. parameters: the most that a network may have.
    """

    def __init__(
        self, candidates: Candidates, limit: float, most: int, parameters: int | None, ends: tuple[float, float]
    ) -> None:
        """ends: the lowest and the highest cost of the front."""
        self.candidates, self.limit, self.most, self.parameters = candidates, limit, most, parameters
        self.samples, self.cheapest = len(candidates.labels), float("inf")
        self.best: list[Ranked] = []
        self._edges = np.geomspace(max(ends[0], 1e-6), max(ends[1], 2e-6), STEPS + 1)
        self._right = np.full(STEPS + 2, -1.0)
        self._front: dict[int, Ranked] = {}

    def consider(self, criterion: str, subset: Subset, right: Array, cost: Array) -> float:
        """Returns how good the subset is: right answers within the limit, or less than 0 by how much it is broken."""
        if not subset or (self.parameters is not None and self.candidates.parameters_of(subset) > self.parameters):
            return -float("inf")
        mean = cost / self.samples
        self.cheapest = min(self.cheapest, lowest := float(mean.min()))
        steps = np.searchsorted(self._edges, mean)
        for level in np.flatnonzero(right > self._right[steps]).tolist():
            found = _ranked(criterion, subset, right, mean, level)
            if found.right > self._right[steps[level]]:
                self._right[steps[level]], self._front[int(steps[level])] = found.right, found
        if lowest > self.limit + 1e-12:
            return self.limit - lowest
        within = np.where(mean <= self.limit + 1e-12, right, -1)
        most = within.max()
        level = int(np.where(within == most, mean, np.inf).argmin())
        found = _ranked(criterion, subset, right, mean, level)
        if len(self.best) < self.most:
            heapq.heappush(self.best, found)
        elif found > self.best[0]:
            heapq.heapreplace(self.best, found)
        return found.right + found.saved * 1e-9

    @property
    def front(self) -> list[Ranked]:
        """By ascending cost, each more accurate than all before."""
        found: list[Ranked] = []
        for point in sorted(self._front.values(), key=lambda point: (-point.saved, -point.right)):
            if not found or point.right > found[-1].right:
                found.append(point)
        return found


def _ranked(criterion: str, subset: Subset, right: Array, mean: Array, level: int) -> Ranked:
    return Ranked(float(right[level]), -float(mean[level]), criterion, subset, level)
