"""Exits that may be kept → what all of them say about held-out samples, and what any subset of them costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..cost import StageCost, merged, path_costs
from ..result import ExitOutput

# Candidates that are kept, ascending, at most one of each place.
Subset = tuple[int, ...]


@dataclass(frozen=True)
class Candidates:
    """E candidates, each a head of some kind at some place, and the final exit.

    outputs: of all candidates and of the final exit, for N samples. labels: [N] int64.
    costs: of the stages and heads of a network with all of them, in MACs or nanoseconds, see `Supernet.net`.
    place: the number of each candidate's place, ascending.
    parameters: of each candidate's head, and of all that every subset has.
    """

    outputs: Sequence[ExitOutput]
    labels: Tensor
    costs: Sequence[StageCost]
    place: Sequence[int]
    parameters: Sequence[int]

    @cached_property
    def by_place(self) -> list[list[int]]:
        """The candidates at each place that has any."""
        return [[e for e, at in enumerate(self.place) if at == place] for place in dict.fromkeys(self.place)]

    @property
    def count(self) -> int:
        """The number of subsets, that of no candidate included."""
        total = 1
        for there in self.by_place:
            total *= len(there) + 1
        return total

    def left_out(self, subset: Subset) -> list[int]:
        return [e for e in range(len(self.place)) if e not in subset]

    def outputs_of(self, subset: Subset) -> list[ExitOutput]:
        """Of the candidates in the subset and of the final exit."""
        return [self.outputs[e] for e in (*subset, len(self.place))]

    def cost_of(self, subset: Subset) -> Tensor:
        """[exits] float32: stages and all heads on the way to each exit, relative to the network without exits."""
        return path_costs(merged(self.costs, self.left_out(subset)))[1]

    def parameters_of(self, subset: Subset) -> int:
        return self.parameters[-1] + sum(self.parameters[e] for e in subset)
