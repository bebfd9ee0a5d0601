"""How many rows wait before each stage, and since when → the stage that runs next."""

from __future__ import annotations

from collections.abc import Sequence


def next_stage(arrivals: int, since: Sequence[int | None], first_ran_last: bool) -> int | None:
    """0 for the first stage on arrivals; None where there is nothing to do.

    arrivals: images that may begin. since: of each stage, what orders its oldest row, the smallest first: the number of
    the launch before it came there, or of the row itself; None where no row waits. first_ran_last: whether the last
    launch was of the first stage.

    The first stage and the later ones take turns, so that an arrival waits for one later stage at most, and rows at
    later stages are never left waiting. Of the later ones the stage with the oldest row runs; survivors that came
    meanwhile run along.
    """
    later = [i for i, launch in enumerate(since) if launch is not None]
    if arrivals and (not later or not first_ran_last):
        return 0
    return min(later, key=lambda i: (since[i], i), default=None)
