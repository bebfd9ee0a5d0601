"""Ids of millions of images → an error where two are the same, in 8 bytes of memory for each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from hashlib import blake2b

import numpy as np


class UniqueIds:
    """Notes ids; `check` tells whether all of them differ."""

    def __init__(self) -> None:
        self._seen = array("Q")

    def add(self, name: str) -> None:
        self._seen.append(_digest(name))

    def check(self, again: Callable[[], Iterable[str]], way_out: str) -> None:
        """`ValueError`, which names an id that occurs twice; again: all ids once more, needed only then."""
        ordered = np.sort(np.frombuffer(self._seen, np.uint64))
        doubled = {int(value) for value in ordered[1:][ordered[1:] == ordered[:-1]]}
        seen = set()
        for name in again() if doubled else ():
            if _digest(name) in doubled:
                if name in seen:
                    raise ValueError(f"two images have the id {name!r}; {way_out}")
                seen.add(name)


def _digest(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
