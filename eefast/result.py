"""What a forward pass hands back: one answer per sample, in the order of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor


class ExitOutput(NamedTuple):
    """What one head returns for its samples.

    logits: [N, K], dtype of the head.
    confidence: [N] float32, sigmoid of the confidence row.
    confidence_logit: [N] float32, the row before the sigmoid, for losses that must not underflow.
    """

    logits: Tensor
    confidence: Tensor
    confidence_logit: Tensor


class ExitResult(NamedTuple):
    """The answer for a batch; every engine returns this, row i belonging to input row i.

    logits: [N, K] float32, of the exit that was taken.
    exit_index: [N] int64, 0 … n; n is the final exit.
    confidence: [N] float32, what the network's criterion compared with the threshold there.
    cost: [N] float32, MACs on the path to that exit ÷ MACs of the plain network.
    """

    logits: Tensor
    exit_index: Tensor
    confidence: Tensor
    cost: Tensor

    @property
    def probs(self) -> Tensor:
        """[N, K] float32, softmax of the logits."""
        return torch.softmax(self.logits, dim=1)

    @property
    def labels(self) -> Tensor:
        """[N] int64, the class with the largest logit."""
        return self.logits.argmax(dim=1)


def _no_attribute(result: ExitResult, name: str) -> NoReturn:
    why = '; it is no tensor: take .logits, or eefast.accelerate(net, output="logits")'
    raise AttributeError(f"an ExitResult has no {name!r}{why * hasattr(Tensor, name)}")


# Not in the class, where type checkers would take any name for an attribute.
ExitResult.__getattr__ = _no_attribute  # type: ignore[attr-defined]


def concatenated(results: Sequence[ExitResult]) -> ExitResult:
    """The results of parts of a batch as those of the whole."""
    return results[0] if len(results) == 1 else ExitResult(*map(torch.cat, zip(*results, strict=True)))
