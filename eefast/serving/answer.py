"""What a server hands back for an image: an answer, or an error that says why there is none."""

from __future__ import annotations

from typing import NamedTuple

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


class Overloaded(RuntimeError):  # noqa: N818
    """No more images may wait."""


class Closed(RuntimeError):  # noqa: N818
    """The server takes no more images, or was closed before this one was answered."""
