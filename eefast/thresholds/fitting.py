"""Outputs of all exits on held-out data → the numbers of a rule that carries, and scaling to fold into the heads.

What has more parameters is taken only where it pays: fitted on one half of the samples, it must beat what has fewer on
the other half, exit by exit, by more than one standard error of the paired gain in negative log-likelihood. Then it is
fitted again, on all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .. import criteria, rules
from ..result import ExitOutput
from .outputs import check_labels
from .scaling import Scaling, minimize, temperature_of

# Held-out samples per class from which on class biases are fitted.
SAMPLES_PER_BIAS = 10


def fit_rule(outputs: Sequence[ExitOutput], labels: Tensor) -> tuple[rules.Rule, Scaling]:
    """`eefast.rules.carried` with its weights, and the scaling that belongs to it: `fold_scaling` puts it into heads.

    The early exits' logits become logits / temperature + bias + weight · (logits of the exit before, so made), each
    exit being one of: as it is; temperature and class bias; these and the weight. Class biases take 10 samples per
    class. A normal distribution of spread 1 around "as it is" is the parameters' prior. The final exit stays as it is,
    so that an image that reaches it gets the answer of the network without early exits.

    outputs, labels: of n + 1 exits on N held-out samples, see `outputs.collect`. Raises `ValueError` for fewer than 2
    samples, labels of one class only, and outputs that are not finite.
    """
    _check(outputs, labels)
    classes, temperature, weights, biases = outputs[0].logits.shape[1], [], [], []
    use_bias = float(len(labels) >= SAMPLES_PER_BIAS * classes)
    families = torch.tensor([[0.0] * (classes + 2), [1, *[use_bias] * classes, 0], [1, *[use_bias] * classes, 1]])
    so_far: list[Tensor | None] = [None, None, None]
    parts = [*halves(len(labels)), torch.arange(len(labels))]
    for i, out in enumerate(outputs):
        allowed = 1 if i == len(outputs) - 1 else 2 if i == 0 else 3
        logits = [out.logits[part].double() for part in parts]

        def losses(p: Tensor, k: int, logits: list[Tensor] = logits, before: list[Tensor | None] = so_far) -> Tensor:
            return functional.cross_entropy(_answer(p, logits[k], before[k]), labels[parts[k]], reduction="none")

        p, first = _chosen(losses, list(families[:allowed].double()))
        so_far = [_answer(q, x, before) for q, x, before in zip((first, first, p), logits, so_far, strict=True)]
        temperature.append(float(temperature_of(p[0])))
        biases.append(tuple(p[1:-1].tolist()))
        weights.append(float(p[-1]))
    ones, nothing = (1.0,) * len(outputs), (0.0,) * len(outputs)
    return rules.carried(weights), Scaling(tuple(temperature), ones, nothing, tuple(biases))


def fit_weights(outputs: Sequence[ExitOutput], labels: Tensor) -> rules.Rule:
    """`eefast.rules.fitted`: logistic regression of "this exit is right" on its five numbers, see `criteria.NUMBERS`.

    An exit at which that is no better than the same on the log-odds of the largest probability, which has the order of
    that probability, has it as its confidence. Arguments and errors as of `fit_rule`.
    """
    _check(outputs, labels)
    parts, weights, bias = [*halves(len(labels)), torch.arange(len(labels))], [], []
    by_log_odds, by_numbers = torch.tensor([0.0] * 5 + [1, 1]).double(), torch.tensor([1.0] * 5 + [0, 1]).double()
    for out in outputs:
        numbers = [number(out.logits, out.confidence_logit) for number in criteria.NUMBERS]
        features = torch.stack([*numbers, log_odds(out.logits)], dim=1).double()
        mean, spread = features.mean(dim=0), features.std(dim=0)
        spread = spread.where(spread > 0, 1.0)
        standard = functional.pad((features - mean) / spread, (0, 1), value=1.0)
        right = (out.logits.argmax(dim=1) == labels).double()

        def losses(p: Tensor, k: int, standard: Tensor = standard, right: Tensor = right) -> Tensor:
            line = standard[parts[k]] @ p
            return functional.binary_cross_entropy_with_logits(line, right[parts[k]], reduction="none")

        p, _ = _chosen(losses, [by_log_odds, by_numbers])
        if p[5] != 0:
            weights.append([float(number is criteria.max_probability) for number in criteria.NUMBERS])
            bias.append(0.0)
        else:
            weights.append((p[:5] / spread[:5]).tolist())
            bias.append(float(p[6] - (p[:6] * mean / spread).sum()))
    return rules.fitted(weights, bias)


def log_odds(logits: Tensor) -> Tensor:
    """log(p1 / (1 - p1)) of the largest probability of logits [N, K], K ≥ 2, where p1 may round to 1: [N]."""
    top, at = logits.max(dim=1)
    return top - logits.scatter(1, at[:, None], -torch.inf).logsumexp(dim=1)


def halves(count: int) -> tuple[Tensor, Tensor]:
    """Indices of the samples that fit and of those that choose; always the same ones."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return order[: count // 2], order[count // 2 :]


def _answer(p: Tensor, logits: Tensor, before: Tensor | None) -> Tensor:
    """p: a temperature's logarithm, K biases, the weight of the answer before."""
    found = logits / temperature_of(p[0]) + p[1:-1]
    return found if before is None else found + p[-1] * before


def _chosen(losses: Callable[[Tensor, int], Tensor], masks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The parameters of all samples, and those of the first half, of the last mask that pays.

    losses: (parameters, 0: of the first half, 1: of the second, 2: of all) → each sample's; masks: 1 where a parameter
    is fitted, else it is 0, from few to many.
    """
    first = [_fitted(losses, mask, 0) for mask in masks]
    chosen = 0
    for k in range(1, len(masks)):
        gain = losses(first[chosen], 1) - losses(first[k], 1)
        if gain.mean() > gain.std() / len(gain) ** 0.5:
            chosen = k
    return _fitted(losses, masks[chosen], 2), first[chosen]


def _fitted(losses: Callable[[Tensor, int], Tensor], mask: Tensor, k: int) -> Tensor:
    """The minimum of the mean loss with a normal prior of spread 1."""
    if not mask.any():
        return mask

    def loss(p: Tensor) -> Tensor:
        each = losses(p * mask, k)
        return each.mean() + p.square().sum() / (2 * len(each))

    return minimize(loss, [0.0] * len(mask)) * mask


def _check(outputs: Sequence[ExitOutput], labels: Tensor) -> None:
    check_labels(labels, len(outputs[0].logits))
    if len(labels) < 2 or len(labels.unique()) < 2:
        raise ValueError(
            f"labels has {len(labels)} samples of {len(labels.unique())} classes; a fit needs at least 2 of both: give "
            "more held-out data"
        )
    for i, out in enumerate(outputs):
        if not (out.logits.isfinite().all() and out.confidence_logit.isfinite().all()):
            raise ValueError(f"exit {i} has outputs that are not finite: no fit is possible; was the network trained?")
