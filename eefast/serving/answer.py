"""What a server hands back for an image: an answer, or an error that says why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, NamedTuple

from torch import Tensor


class Answer(NamedTuple):
    """The answer to one image.

    label: the class with the largest logit. logits: [K] float32, of the exit that was taken. exit: 0 … n.
    confidence, cost: see `eefast.ExitResult`.
    waited: seconds from `submit` to the start of the work. computed: seconds from there to the answer.
    late: whether its deadline had passed by then.
    """

    label: int
    logits: Tensor
    exit: int
    confidence: float
    cost: float
    waited: float
    computed: float
    late: bool

    def figures(self, classes: Sequence[str] | None = None) -> dict[str, Any]:
        """All but the logits as values of JSON, times in milliseconds; classes: names of the network's."""
        return {
            "label": self.label,
            "class": None if classes is None else classes[self.label],
            "exit": self.exit,
            "confidence": self.confidence if isfinite(self.confidence) else None,
            "cost": self.cost,
            "late": self.late,
            "waited_ms": round(1e3 * self.waited, 3),
            "computed_ms": round(1e3 * self.computed, 3),
        }


class Overloaded(RuntimeError):  # noqa: N818
    """No more images may wait."""


class Closed(RuntimeError):  # noqa: N818
    """The server takes no more images, or was closed before this one was answered."""
