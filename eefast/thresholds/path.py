"""Cuts on some samples → a path of thresholds, from no early exit to the lowest cost, for other samples to judge."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .. import criteria
from . import search
from .cuts import Cuts

# About how many thresholds the path has, and at most between two neighbours of the front: more only take more time.
POINTS, MOST_STEPS = 240, 24


def accurate_to_cheap(cuts: Cuts, criterion: criteria.Criterion) -> Tensor:
    """[M, n] float32: first no early exit, then the front of accuracy against cost from its accurate end.

    Between two neighbours of the front the cuts of all exits change evenly by rank, so that costs lie close together.
    """
    _, front = search.find_front(cuts)
    corners = [[0] * cuts.num_exits, *reversed(front[:: -(-len(front) // POINTS)])]
    steps = max(1, min(POINTS // len(corners), MOST_STEPS))
    between = [
        tuple(round(a + (b - a) * step / steps) for a, b in zip(one, two, strict=True))
        for one, two in pairwise(corners)
        for step in range(1, steps + 1)
    ]
    columns = torch.tensor(list(dict.fromkeys(between))).T
    points = torch.stack([values[picks] for values, picks in zip(cuts.thresholds, columns, strict=True)], dim=1)
    return torch.cat([torch.full((1, cuts.num_exits), criterion.never), points.float()])
