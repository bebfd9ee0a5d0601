"""Memory for features that a caller keeps; it is lent again when nobody holds what was in it."""

from __future__ import annotations

from collections import deque
from math import prod
from weakref import ref

import numpy as np
import torch
from torch import Tensor

KEPT, KEPT_BYTES = 2, 1 << 26
"""How many pieces of memory wait to be lent again, and the largest that does."""


class LentMemory:
    """In fresh memory the first write to every page is a fault: for survivors' features twice the time of storing them.

    For any number of threads without a lock: a piece is in the queue, or one thread looks at it.
    """

    def __init__(self) -> None:
        self._kept: deque[tuple[np.ndarray, ref[np.ndarray]]] = deque(maxlen=KEPT)

    def lend(self, shape: tuple[int, ...], dtype: type) -> Tensor:
        """A contiguous tensor with any content, on the CPU, whose memory no other one in use shares.

        dtype: NumPy's.
        """
        size = prod(shape) * dtype().itemsize
        found, lent = None, []
        while found is None:
            try:
                piece, borrower = self._kept.popleft()
            except IndexError:
                found = np.empty(size, np.uint8)
                break
            if borrower() is not None:
                lent.append((piece, borrower))
            elif len(piece) >= size:
                found = piece
        # The tensor's storage holds this view for as long as anything uses it.
        view: np.ndarray = found[:size].view(dtype).reshape(shape)
        with torch.inference_mode(False):
            memory = torch.from_numpy(view)
        self._kept.extend(lent)
        if len(found) <= KEPT_BYTES:
            self._kept.append((found, ref(view)))
        return memory
