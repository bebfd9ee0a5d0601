"""What all exits say about a batch → one number to minimise, in log-softmax and log-sigmoid form throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..result import ExitOutput

# (outputs of exits 0 … n, labels [N] int64, cost [n + 1] already weighted by λ) → scalar
Loss = Callable[[Sequence[ExitOutput], Tensor, Tensor], Tensor]


def deep_supervision(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """Σ over exits of the negative log-likelihood (EENets' v0); confidences and cost play no part."""
    return torch.stack([F.cross_entropy(out.logits, labels) for out in outputs]).sum()


def mixtures(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """Σ over exits i of NLL(P_i) + mean(C_i): EENets' default loss, v2 (Demir & Akbas 2024).

    P_i = h_i·p_i + (1 - h_i)·P_{i+1} and C_i = h_i·c_i + (1 - h_i)·C_{i+1} from the final exit backwards, with p_i the
    softmax, h_i the confidence and c_i the weighted cost of exit i: what is expected of a sample that reaches exit i.
    """
    log_mixture = -F.cross_entropy(outputs[-1].logits, labels, reduction="none")
    mixed_cost = cost[-1].expand_as(log_mixture)
    total = mixed_cost.mean() - log_mixture.mean()
    for out, exit_cost in zip(reversed(outputs[:-1]), reversed(cost[:-1]), strict=True):
        z = out.confidence_logit.to(log_mixture.dtype)
        log_likelihood = -F.cross_entropy(out.logits, labels, reduction="none")
        log_mixture = torch.logaddexp(F.logsigmoid(z) + log_likelihood, F.logsigmoid(-z) + log_mixture)
        mixed_cost = torch.lerp(mixed_cost, exit_cost.expand_as(mixed_cost), torch.sigmoid(z))
        total = total + mixed_cost.mean() - log_mixture.mean()
    return total


def correctness(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """Σ over exits of the binary cross-entropy between the confidence and "this exit is right" (as in NACHOS).

    The target of every sample is a constant 0 or 1, so no gradient reaches the classifier rows through it.
    """
    terms = []
    for out in outputs:
        right = (out.logits.detach().argmax(dim=1) == labels).to(out.confidence_logit.dtype)
        terms.append(F.binary_cross_entropy_with_logits(out.confidence_logit, right))
    return torch.stack(terms).sum()


LOSSES: dict[str, Loss] = {"deep_supervision": deep_supervision, "mixtures": mixtures, "correctness": correctness}
ALIASES = {"v0": "deep_supervision", "v2": "mixtures"}


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight·loss.

    terms: (weight, name in `LOSSES`) of every term.
    cost_weight: λ, the price of cost in units of the negative log-likelihood.
    """

    terms: tuple[tuple[float, str], ...]
    cost_weight: float = 1.0

    def __call__(self, outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
        cost = cost.to(outputs[0].logits.dtype) * self.cost_weight
        return torch.stack([weight * LOSSES[name](outputs, labels, cost) for weight, name in self.terms]).sum()


def parse(text: str, cost_weight: float = 1.0) -> WeightedSum:
    """The loss written as "deep_supervision + 0.5*correctness"; a term is a name of `LOSSES` or `ALIASES`.

    Raises `ValueError` for what is neither.
    """
    terms = []
    for term in text.split("+"):
        weight, _, name = term.rpartition("*")
        name = ALIASES.get(name.strip(), name.strip())
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = float("nan")
        if name not in LOSSES or not value > 0:
            known = ", ".join((*LOSSES, *ALIASES))
            raise ValueError(f"loss={text!r}: {term.strip()!r} is no term; write name or weight*name, name in {known}")
        terms.append((value, name))
    return WeightedSum(tuple(terms), cost_weight)
