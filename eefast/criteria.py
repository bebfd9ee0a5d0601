"""Exit rules: turn a head's logits and confidence row into the number that is compared with the threshold.

Each rule is a pure function in float32 plus an explicit comparison. A sample exits where the comparison holds, and goes
on otherwise: NaN compares false, so such a sample goes on to the final exit. Rules that carry state across exits
(patience, survival products) would take that state as a third argument and return it with the confidence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Criterion:
    """One exit rule.

    name: key in `CRITERIA`.
    confidence: (logits [N, K], confidence_logit [N]) → [N] float32.
    comparison: ">" exits above the threshold, "<" below; both strict, exactly at the threshold a sample goes on.
    default_threshold: used where a network is built without thresholds.
    """

    name: str
    confidence: Callable[[Tensor, Tensor], Tensor]
    comparison: str
    default_threshold: float

    @property
    def never(self) -> float:
        """The threshold at which no sample exits."""
        return float("inf") if self.comparison == ">" else -float("inf")

    @property
    def always(self) -> float:
        """The threshold at which every sample exits whose confidence is a finite number."""
        return -self.never

    def leaves(self, confidence: Tensor, threshold: Tensor) -> Tensor:
        """[N] bool: which samples exit; `threshold` is a float32 scalar tensor."""
        return confidence > threshold if self.comparison == ">" else confidence < threshold


def exits_by(rule: Criterion, confidence: Tensor, threshold: Tensor) -> Tensor:
    """[N] bool: which samples exit; threshold: [], or [N], one for each, where NaN lets a sample exit in any case."""
    exits = rule.leaves(confidence, threshold)
    return exits | threshold.isnan() if threshold.dim() else exits


def learned_confidence(logits: Tensor, confidence_logit: Tensor) -> Tensor:
    """Sigmoid of the confidence row (EENets, Demir & Akbas 2024, §3)."""
    return torch.sigmoid(confidence_logit.float())


def max_probability(logits: Tensor, confidence_logit: Tensor) -> Tensor:
    """Largest softmax probability (BranchyNet's successors; T-RecX)."""
    return torch.softmax(logits.float(), dim=1).amax(dim=1)


def entropy(logits: Tensor, confidence_logit: Tensor) -> Tensor:
    """Entropy of the softmax in nats, 0·log 0 = 0 (BranchyNet; BatchCond)."""
    log_probs = torch.log_softmax(logits.float(), dim=1)
    probs = log_probs.exp()
    # -inf * 0 is NaN, so the factor is zeroed as well; a NaN probability is not 0 and stays NaN.
    return -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(dim=1)


def margin(logits: Tensor, confidence_logit: Tensor) -> Tensor:
    """Largest minus second-largest softmax probability (EDANAS); with one class, the probability itself."""
    probs = torch.softmax(logits.float(), dim=1)
    top = probs.topk(min(2, probs.shape[1]), dim=1).values
    return top[:, 0] - top[:, 1] if probs.shape[1] > 1 else top[:, 0]


CRITERIA = {
    c.name: c
    for c in (
        Criterion("learned", learned_confidence, ">", 0.5),
        Criterion("max_probability", max_probability, ">", 0.9),
        Criterion("entropy", entropy, "<", 0.3),
        Criterion("margin", margin, ">", 0.8),
    )
}


def get(name: str) -> Criterion:
    """The criterion called `name`; `ValueError` lists all names."""
    if name not in CRITERIA:
        raise ValueError(f"criterion={name!r} is unknown; choose one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
