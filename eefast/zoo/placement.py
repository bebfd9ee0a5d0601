"""Placement schemes: after which residual block each early exit stands (EENets, Demir & Akbas 2024, §3)."""

from __future__ import annotations

from collections.abc import Sequence

GOLD_RATIO = 1.61803398875

PLACEMENTS = {
    "fine": lambda i, n: 1 - 0.95 ** (i + 1),
    "pareto": lambda i, n: 1 - 0.8 ** (i + 1),
    "linear": lambda i, n: (i + 1) / (n + 1),
    "gold_ratio": lambda i, n: GOLD_RATIO ** (i - n),
}


def place(block_costs: Sequence[float], num_exits: int, placement: str | Sequence[int]) -> tuple[int, ...]:
    """Blocks before each exit, ascending.

    block_costs: for every block, MACs up to and including it ÷ MACs of the plain network.
    placement: a name in `PLACEMENTS`: exit i goes after the first block whose cost reaches the scheme's share, one
        exit per block at most; or the numbers of blocks themselves.
    Raises `ValueError` where that is impossible, saying how many exits fit.
    """
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise ValueError(f"placement={placement!r} is unknown; choose one of {', '.join(PLACEMENTS)}")
        if num_exits < 1:
            raise ValueError(f"num_exits={num_exits} must be at least 1; the plain twin is zoo.resnet(...)")
        chosen: list[int] = []
        for blocks, cost in enumerate(block_costs, start=1):
            if len(chosen) < num_exits and cost >= PLACEMENTS[placement](len(chosen), num_exits):
                chosen.append(blocks)
        if len(chosen) < num_exits:
            raise ValueError(
                f"num_exits={num_exits} with placement={placement!r} does not fit: "
                f"{_most_exits(block_costs, placement, num_exits)} exits fit into {len(block_costs)} blocks"
            )
        return tuple(chosen)
    positions = tuple(int(p) for p in placement)
    if not positions or sorted(set(positions) & set(range(1, len(block_costs) + 1))) != list(positions):
        raise ValueError(f"placement={positions} must be ascending numbers of blocks in 1 … {len(block_costs)}")
    return positions


def _most_exits(block_costs: Sequence[float], placement: str, below: int) -> int:
    for n in range(below - 1, 0, -1):
        try:
            return len(place(block_costs, n, placement))
        except ValueError:
            continue
    return 0
