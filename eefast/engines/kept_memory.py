"""Memory of a large result → the memory of the next one, as soon as nothing holds the result: fresh pages are slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from weakref import ReferenceType, ref

import numpy as np
import torch
from torch import Tensor

MOST = 1 << 26
"""Bytes that are kept at most."""
LINE = 64
"""Bytes that a processor's cache reads at a time; vectors that lie across two are slower."""


class KeptMemory:
    """The memory of the last result is kept; where something holds that still, the next one gets new memory."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[np.ndarray, ReferenceType[np.ndarray]]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor [N, C, H, W], channels-last, of any contents, whose memory no other tensor has."""
        size = math.prod(shape) * dtype.itemsize
        if not 0 < size <= MOST:
            return torch.empty(tuple(shape), dtype=dtype, memory_format=torch.channels_last)
        # Taken out, so that no other thread takes it.
        memory, held = self._kept.pop("last", (None, None))
        if memory is None or memory.nbytes < size + LINE or (held is not None and held() is not None):
            memory = np.empty(size + LINE, np.uint8)
        # Tensors hold the view as long as there is one of them.
        view = memory[:]
        self._kept["last"] = memory, ref(view)
        found = torch.from_numpy(view)
        start = -found.data_ptr() % LINE
        n, channels, height, width = shape
        return found[start : start + size].view(dtype).view(n, height, width, channels).permute(0, 3, 1, 2)
