"""Exit rules: turn a head's logits and confidence row into the number that is compared with the threshold.

Each rule is a pure function in float32 plus an explicit comparison. A sample exits where the comparison holds, and goes
on otherwise: NaN compares false, so such a sample goes on to the final exit. Rules that carry the answer so far from
exit to exit are rows of nine numbers, which `carry` applies, see `eefast.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

Step = Callable[[int, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(exit, logits [N, K], confidence row [N], L [N, K] and s [N] of the exit before) → L and s, all of them float32."""


@dataclass(frozen=True)
class Criterion:
    """One exit rule.

    name: key in `CRITERIA`.
    confidence: (logits [N, K], confidence_logit [N]) → [N] float32.
    comparison: ">" exits above the threshold, "<" below; both strict, exactly at the threshold a sample goes on.
    default_threshold: used where a network is built without thresholds.
    carries: whether it carries the answer so far; then logits and confidence_logit are what `carry` or `step` returned.
    step: what does so instead of a table of `eefast.rules`, see `eefast.rules.PythonRule`.
    """

    name: str
    confidence: Callable[[Tensor, Tensor], Tensor]
    comparison: str
    default_threshold: float
    carries: bool = False
    step: Step | None = None

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


def carried_confidence(logits: Tensor, confidence_logit: Tensor) -> Tensor:
    """What `carry` returned beside the logits."""
    return confidence_logit.float()


CARRYING = {
    name: Criterion(name, carried_confidence, ">", threshold, carries=True)
    for name, threshold in {
        "patience": 1.5,
        "vote": 1.5,
        "survival": 2.3025851,  # -log(1 - 0.9)
        "carried": 0.9,
        "fitted": 0.0,
    }.items()
}
"""Kinds of tables of `eefast.rules`; to ops all of them are "carried"."""


def get(name: str) -> Criterion:
    """The criterion called `name`; `ValueError` lists all names."""
    found = CRITERIA.get(name) or CARRYING.get(name)
    if found is None:
        raise ValueError(f"criterion={name!r} is unknown; choose one of {', '.join([*CRITERIA, *CARRYING])}")
    return found


NUMBERS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    learned_confidence,
    max_probability,
    lambda logits, confidence_logit: -entropy(logits, confidence_logit),
    margin,
    lambda logits, confidence_logit: softplus(confidence_logit.float()),
)
"""What the first five numbers of a row weigh: σ(z), p1, −H, margin and softplus(z) = −log(1 − σ(z))."""


def carry(
    logits: Tensor, confidence_logit: Tensor, row: Tensor, before: Tensor | None, confidence_before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One exit's step of a rule that carries: logits [N, K] and confidence row [N] → L [N, K] and s [N], both float32.

        L = logits + a · before
        s = bias + Σ weights · NUMBERS(L, z) + (keep + keep_if_same · [argmax L = argmax before]) · confidence_before

    row: [9] float32: five weights, bias, keep, keep_if_same, a. A number that is exactly 0 leaves its term out, and so
        does keep + keep_if_same = 0 unless `confidence_before` is NaN; what is left out is not looked at.
    before, confidence_before: what this returned at the exit before; None where the row does not read them.
    A NaN in a number that is used, or with keep_if_same in L or `before`, makes s NaN.
    """
    return carry_numbers(logits, confidence_logit, row.tolist(), before, confidence_before)


def carry_numbers(
    logits: Tensor,
    confidence_logit: Tensor,
    row: Sequence[float],
    before: Tensor | None,
    confidence_before: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `carry`, of nine numbers that are known while the calculation is traced."""
    *weights, bias, keep, keep_if_same, a = row
    answer = logits.float()
    if a != 0:
        assert before is not None
        answer = answer + a * before
    total = torch.full_like(confidence_logit, bias, dtype=torch.float32)
    for weight, number in zip(weights, NUMBERS, strict=True):
        total = total if weight == 0 else total + weight * number(answer, confidence_logit)
    if keep == keep_if_same == 0:
        return answer, total
    assert confidence_before is not None
    factor = torch.full_like(total, keep)
    if keep_if_same != 0:
        assert before is not None
        same = (answer.argmax(dim=1) == before.argmax(dim=1)).float()
        unclear = answer.isnan().any(dim=1) | before.isnan().any(dim=1)
        factor = factor + keep_if_same * same.masked_fill(unclear, torch.nan)
    return answer, total + (factor * confidence_before).masked_fill((factor == 0) & ~confidence_before.isnan(), 0.0)


def carry_on(
    rule: Tensor | Step, exit_index: int, logits: Tensor, confidence_logit: Tensor, before: Tensor, confidence: Tensor
) -> tuple[Tensor, Tensor]:
    """L and s of an exit by a table [n + 1, 9] or by a step."""
    if isinstance(rule, Tensor):
        return carry(logits, confidence_logit, rule[exit_index], before, confidence)
    answer, value = rule(exit_index, logits.float(), confidence_logit.float(), before, confidence)
    if answer.shape != before.shape or value.shape != confidence.shape:
        raise ValueError(
            f"the rule returns {list(answer.shape)} and {list(value.shape)} at exit {exit_index}; expected logits "
            f"{list(before.shape)} and confidences {list(confidence.shape)}"
        )
    return answer.float(), value.float()
