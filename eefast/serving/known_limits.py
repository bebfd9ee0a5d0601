"""A frozen network → the engine and the limits of the last image, for as long as they are those of the network."""

from __future__ import annotations

from torch import Tensor

from ..api import Accelerated
from ..engines import Engine


class KnownLimits:
    """What `Accelerated.ready` returned; whether it would return the same again is found out in less time.

    fast: frozen, since else all weights are compared.
    """

    __slots__ = ("engine", "fast", "limits", "numbers", "thresholds")

    def __init__(self, fast: Accelerated, engine: Engine, limits: Tensor) -> None:
        """limits: [n] float32 on the CPU, of the network's thresholds."""
        self.fast, self.engine, self.limits = fast, engine, limits
        self.thresholds, self.numbers = fast.net.thresholds, limits.tolist()

    def hold(self) -> bool:
        """Equal numbers are enough: thresholds half of which another thread has changed are no longer those."""
        net = self.fast.net
        return (
            net._buffers["thresholds"] is self.thresholds
            and self.thresholds.tolist() == self.numbers
            and self.fast.engine is self.engine
            and not net.training
        )
