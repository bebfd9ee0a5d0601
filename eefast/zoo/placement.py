"""Costs of the blocks and a placement scheme → the residual blocks after which exits are put.

The schemes are those of EENets (Demir & Akbas 2024, §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

GOLD_RATIO = 1.61803398875

# Exit i of n comes after the first block whose cost reaches this share of the plain network's.
SCHEMES = {
    "fine": lambda i, n: 1 - 0.95 ** (i + 1),
    "pareto": lambda i, n: 1 - 0.8 ** (i + 1),
    "linear": lambda i, n: (i + 1) / (n + 1),
    "gold_ratio": lambda i, n: GOLD_RATIO ** (i - n),
}


def place(block_costs: Sequence[float], num_exits: int, placement: str | Sequence[int]) -> tuple[int, ...]:
    """Blocks before each exit, ascending.

    block_costs: for every block, MACs up to and including it ÷ MACs of the plain network.
    placement: a name in `SCHEMES`: exit i goes after the first block whose cost reaches the scheme's share, one
        exit per block at most; or the numbers of blocks themselves, 0: an exit before all of them, after the stem.
    Raises `ValueError` where that is impossible, saying how many exits fit.
    """
    blocks = len(block_costs)
    if isinstance(placement, str):
        if placement not in SCHEMES:
            raise ValueError(f"placement={placement!r} is unknown; choose one of {', '.join(SCHEMES)}")
        wanted = _integer("num_exits", num_exits)
        if wanted < 1:
            raise ValueError(f"num_exits={wanted} must be at least 1; without exits, take zoo.resnet(...)")
        chosen = _chosen(block_costs, wanted, placement) if wanted <= blocks else ()
        if len(chosen) < wanted:
            counts = range(min(wanted - 1, blocks), 0, -1)
            fit = next((n for n in counts if len(_chosen(block_costs, n, placement)) == n), 0)
            raise ValueError(
                f"num_exits={wanted} with placement={placement!r} does not fit: {fit} exits fit into {blocks} blocks"
            )
        return chosen
    try:
        positions = tuple(_integer("placement", block) for block in placement)
    except TypeError as error:
        raise ValueError(f"placement={placement!r} must be one of {', '.join(SCHEMES)}, or numbers") from error
    if not positions or sorted(set(positions) & set(range(blocks + 1))) != list(positions):
        raise ValueError(f"placement={positions} must be ascending numbers of blocks in 0 … {blocks}")
    return positions


def _chosen(block_costs: Sequence[float], num_exits: int, placement: str) -> tuple[int, ...]:
    """What the scheme gives for this number of exits; fewer positions where they do not fit."""
    chosen: list[int] = []
    for block, cost in enumerate(block_costs, start=1):
        if len(chosen) < num_exits and cost >= SCHEMES[placement](len(chosen), num_exits):
            chosen.append(block)
    return tuple(chosen)


def _integer(name: str, value: object) -> int:
    # True would count as one exit, and 2.5 as two or three.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError(f"{name}={value!r}: give whole numbers")
    return index(value)
