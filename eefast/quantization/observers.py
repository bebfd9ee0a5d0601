"""Values, batch by batch → their range; names and meaning as in torchao's and PT2E's observers."""

from __future__ import annotations

import torch
from torch import Tensor


class MinMaxObserver:
    """The smallest and the largest value seen."""

    def __init__(self) -> None:
        self.min_val, self.max_val = float("inf"), -float("inf")

    def observe(self, values: Tensor) -> None:
        low, high = (float(v) for v in values.aminmax())
        self.min_val, self.max_val = min(self.min_val, low), max(self.max_val, high)

    def bounds(self) -> tuple[float, float]:
        return self.min_val, self.max_val


class PercentileObserver(MinMaxObserver):
    """The percentiles 100 - p and p of all values seen, exactly: as many are kept as lie beyond.

    percentile: p, at most 100, which gives the smallest and the largest value. images: how many will be seen in all.
    """

    def __init__(self, percentile: float, images: int) -> None:
        super().__init__()
        self.share, self.images = 1 - percentile / 100, images
        self.lowest, self.highest = torch.empty(0), torch.empty(0)

    def observe(self, values: Tensor) -> None:
        """values: of n images [n, …]."""
        super().observe(values)
        beyond = int(values[0].numel() * self.images * self.share)
        if beyond:
            self.highest = _largest(self.highest, values, beyond + 1)
            self.lowest = -_largest(-self.lowest, -values, beyond + 1) if self.min_val < 0 else self.lowest

    def bounds(self) -> tuple[float, float]:
        low = float(self.lowest.max()) if len(self.lowest) else self.min_val
        return low, float(self.highest.min()) if len(self.highest) else self.max_val


def _largest(found: Tensor, values: Tensor, count: int) -> Tensor:
    """The `count` largest of both, or all of them."""
    values = values.flatten()
    found = torch.cat([found, values.topk(min(count, len(values))).values])
    return found.topk(min(count, len(found))).values


class PerChannelMinMaxObserver:
    """The largest magnitude of every output channel, for symmetric weights."""

    def observe(self, weight: Tensor) -> None:
        self.max_val = weight.abs().flatten(1).amax(1)
