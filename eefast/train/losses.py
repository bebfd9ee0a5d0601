"""Outputs of all exits for a batch → the loss to minimise, in log-softmax and log-sigmoid form throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..result import ExitOutput
from .tags import exit_tags

# (outputs of exits 0 … n in float32 or float64, labels [N] int64, cost [n + 1] already weighted by λ, exit tags [N]
# int64 or None) → scalar; N ≥ 1
Loss = Callable[[Sequence[ExitOutput], Tensor, Tensor, Tensor | None], Tensor]

TEMPERATURE = 3.0
"""Of the softmaxes that `distillation` compares."""


def deep_supervision(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """Σ over exits of the negative log-likelihood (EENets' v0); confidences and cost are not used."""
    return _log_likelihoods(outputs, labels).mean(dim=1).sum().neg()


def mixture(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """NLL(P_0) + mean(C_0), the expected loss of a sample that enters the network (EENets' v1), see `mixtures`."""
    return _expected_losses(outputs, labels, cost)[0]


def mixtures(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """Σ over exits i of NLL(P_i) + mean(C_i): EENets' default loss, v2 (Demir & Akbas 2024).

    P_i = h_i·p_i + (1 - h_i)·P_{i+1} and C_i = h_i·c_i + (1 - h_i)·C_{i+1} from the final exit backwards, with p_i the
    softmax, h_i the confidence and c_i the weighted cost of exit i: the expected loss of a sample that reaches exit i.
    """
    return _expected_losses(outputs, labels, cost).sum()


def confidence_weighted(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None
) -> Tensor:
    """Σ over exits i of w_i·(NLL(p_i) + c_i), w_i the batch's mean confidence as a part of all exits' (EENets' v3)."""
    # The mean over the batch differs from this sum by a factor that all exits share.
    log_confidence = torch.logsumexp(F.logsigmoid(_confidence_logits(outputs)), dim=1)
    return (log_confidence.softmax(dim=0) * (cost - _log_likelihoods(outputs, labels).mean(dim=1))).sum()


def exit_tagged(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """NLL and cost of every sample at the exit of its tag, and each confidence against "tag = i" (EENets' v4).

    Its binary cross-entropy is balanced: a sample with tag i has the share of the batch's other samples as its weight,
    and these have the share of samples with tag i. Without tags, `eefast.train.tags.exit_tags` of these outputs.
    """
    log_likelihood = _log_likelihoods(outputs, labels)
    tags = exit_tags(outputs, labels, cost) if tags is None else tags
    taken = cost[tags] - log_likelihood.gather(0, tags[None])[0]
    tagged = F.one_hot(tags, len(outputs)).T.to(log_likelihood.dtype)
    share = tagged.mean(dim=1, keepdim=True)
    weight = tagged * (1 - share) + (1 - tagged) * share
    confidence_loss = F.binary_cross_entropy_with_logits(
        _confidence_logits(outputs).to(tagged.dtype), tagged, weight, reduction="none"
    )
    return taken.mean() + confidence_loss.mean(dim=1).sum()


def early_supervision(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None
) -> Tensor:
    """Mean over the early exits of the negative log-likelihood (PTEENet's v0)."""
    return -_log_likelihoods(outputs[:-1], labels).mean()


def mean_mixtures(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """`mixtures` divided by the number of early exits (PTEENet's v2)."""
    return _expected_losses(outputs, labels, cost).sum() / (len(outputs) - 1)


def early_mixtures(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """`mean_mixtures` without the final exit's term (PTEENet's v5)."""
    return _expected_losses(outputs, labels, cost)[:-1].mean()


def final_supervision(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None
) -> Tensor:
    """Negative log-likelihood of the final exit: trains the backbone alone (PTEENet's v6)."""
    return F.cross_entropy(outputs[-1].logits, labels)


def distillation(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """Σ over the early exits of T²·KL(p_n ‖ p_i), mean over the batch, of softmaxes at temperature T = `TEMPERATURE`.

    The final exit teaches, it does not learn from this (Phuong & Lampert 2019); T² keeps the size of gradients (Hinton
    et al. 2015).
    """
    return _divergence(outputs[:-1], outputs[-1].logits)


def taught(outputs: Sequence[ExitOutput], teacher: Tensor) -> Tensor:
    """As `distillation`, but of all exits from the logits of another network, [N, K]."""
    return _divergence(outputs, teacher)


def final_taught(outputs: Sequence[ExitOutput], teacher: Tensor) -> Tensor:
    """`taught` of the final exit alone: for a plain network."""
    return _divergence(outputs[-1:], teacher)


def correctness(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, tags: Tensor | None = None) -> Tensor:
    """Σ over exits of the binary cross-entropy between the confidence and "this exit is right" (as in NACHOS).

    The target of every sample is a constant 0 or 1, so no gradient reaches the classifier rows through it.
    """
    z = _confidence_logits(outputs)
    right = torch.stack([out.logits.detach().argmax(dim=1) == labels for out in outputs]).to(z.dtype)
    return F.binary_cross_entropy_with_logits(z, right, reduction="none").mean(dim=1).sum()


def _divergence(outputs: Sequence[ExitOutput], teacher: Tensor) -> Tensor:
    wanted = (teacher.detach() / TEMPERATURE).log_softmax(dim=1)
    learned = torch.stack([(out.logits / TEMPERATURE).log_softmax(dim=1) for out in outputs])
    return TEMPERATURE**2 * (wanted.exp() * (wanted - learned)).sum(dim=2).mean(dim=1).sum()


def _log_likelihoods(outputs: Sequence[ExitOutput], labels: Tensor) -> Tensor:
    """[exits, N]."""
    return -torch.stack([F.cross_entropy(out.logits, labels, reduction="none") for out in outputs])


def _confidence_logits(outputs: Sequence[ExitOutput]) -> Tensor:
    """[exits, N]."""
    return torch.stack([out.confidence_logit for out in outputs])


def _expected_losses(outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor) -> Tensor:
    """NLL(P_i) + mean(C_i) of every exit i, [n + 1]; see `mixtures`."""
    log_likelihood = _log_likelihoods(outputs, labels)
    log_mixture, mixed_cost = log_likelihood[-1], cost[-1].expand_as(log_likelihood[-1])
    expected = [(mixed_cost - log_mixture).mean()]
    for i in reversed(range(len(outputs) - 1)):
        z = outputs[i].confidence_logit.to(log_mixture.dtype)
        log_mixture = torch.logaddexp(F.logsigmoid(z) + log_likelihood[i], F.logsigmoid(-z) + log_mixture)
        mixed_cost = torch.lerp(mixed_cost, cost[i].expand_as(mixed_cost), torch.sigmoid(z))
        expected.append((mixed_cost - log_mixture).mean())
    return torch.stack(expected[::-1])


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        deep_supervision,
        mixture,
        mixtures,
        confidence_weighted,
        exit_tagged,
        correctness,
        distillation,
        early_supervision,
        mean_mixtures,
        early_mixtures,
        final_supervision,
    )
}
# Terms that need the logits of a teacher.
TAUGHT: dict[str, Callable[[Sequence[ExitOutput], Tensor], Tensor]] = {
    loss.__name__: loss for loss in (taught, final_taught)
}
# The names in the published code of EENets and of its fork PTEENet, which changed some of them.
ALIASES = {
    "v0": "deep_supervision",
    "v1": "mixture",
    "v2": "mixtures",
    "v3": "confidence_weighted",
    "v4": "exit_tagged",
    "pteenet_v0": "early_supervision",
    "pteenet_v2": "mean_mixtures",
    "pteenet_v5": "early_mixtures",
    "pteenet_v6": "final_supervision",
}


@dataclass(frozen=True)
class WeightedSum:
    """Σ weight·loss, in float32 where the logits are narrower.

    terms: (weight, name in `LOSSES` or `TAUGHT`) of every term.
    cost_weight: λ, the price of cost in units of the negative log-likelihood.
    """

    terms: tuple[tuple[float, str], ...]
    cost_weight: float = 1.0

    @property
    def uses_tags(self) -> bool:
        """Whether a term needs exit tags."""
        return any(name == "exit_tagged" for _, name in self.terms)

    @property
    def trains_final_alone(self) -> bool:
        """Whether no term reads an early exit."""
        return all(name in ("final_supervision", "final_taught") for _, name in self.terms)

    @property
    def uses_teacher(self) -> bool:
        """Whether a term needs the logits of a teacher."""
        return any(name in TAUGHT for _, name in self.terms)

    def __call__(
        self,
        outputs: Sequence[ExitOutput],
        labels: Tensor,
        cost: Tensor,
        tags: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> Tensor:
        dtype = torch.promote_types(outputs[0].logits.dtype, torch.float32)
        outputs = [ExitOutput(o.logits.to(dtype), o.confidence, o.confidence_logit.to(dtype)) for o in outputs]
        cost = cost.to(dtype) * self.cost_weight
        terms = []
        for weight, name in self.terms:
            if name in TAUGHT:
                assert teacher is not None
                terms.append(weight * TAUGHT[name](outputs, teacher.to(dtype)))
            else:
                terms.append(weight * LOSSES[name](outputs, labels, cost, tags))
        return torch.stack(terms).sum()


def parse(text: str, cost_weight: float = 1.0) -> WeightedSum:
    """The loss written as "deep_supervision + 0.5*correctness"; a term is a name of `LOSSES`, `TAUGHT` or `ALIASES`.

    Raises `ValueError` for unknown names and for weights that are not positive and finite.
    """
    terms = []
    for term in text.split("+"):
        weight, _, name = term.rpartition("*")
        name = ALIASES.get(name.strip(), name.strip())
        try:
            value = float(weight) if weight else 1.0
        except ValueError:
            value = float("nan")
        if name not in (*LOSSES, *TAUGHT) or not 0 < value < float("inf"):
            known = ", ".join((*LOSSES, *TAUGHT, *ALIASES))
            raise ValueError(f"loss={text!r}: {term.strip()!r} is no term; write name or weight*name, name in {known}")
        terms.append((value, name))
    return WeightedSum(tuple(terms), cost_weight)
