"""Rules that carry, sample by sample in plain Python: logits of every exit → the exit taken, its logits and number.

Each oracle follows the rule's definition in its paper, in float64, and shares nothing with the table of coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ONE_HOT = {"learned": 0, "max_probability": 1, "entropy": 2, "margin": 3}
"""The column of the table that is 1 where a rule that carries is one of the named ones."""
Exits = Sequence[tuple[Sequence[float], float]]
"""Of one sample: logits and confidence row of every exit."""
# What was in the results before; it must not matter.
POISON = math.nan


@dataclass(frozen=True)
class Taken:
    """The answer of one sample.

    number: what was compared with the threshold.  doubt: least distance from a threshold on the way.
    """

    exit: int
    logits: list[float]
    number: float
    doubt: float


@dataclass(frozen=True)
class RuleCase:
    """A rule as a table and as its definition.

    table: [n + 1, 9] float32.  thresholds: [n] float32.  oracle: of one sample.
    exact: whether every number is an integer, so that no rounding can change an exit.
    """

    table: Tensor
    thresholds: Tensor
    oracle: Callable[[Exits], Taken]
    exact: bool = False


def rows(n: int, **columns: float | Sequence[float]) -> Tensor:
    """A table of n + 1 rows by column: learned, max_probability, entropy, margin, softplus, bias, keep, keep_if_same,
    logits. What is kept starts at the second exit.
    """
    names = (*ONE_HOT, "softplus", "bias", "keep", "keep_if_same", "logits")
    table = torch.zeros(n + 1, len(names))
    for name, value in columns.items():
        table[:, names.index(name)] = torch.as_tensor(value, dtype=torch.float32)
    table[0, 6:] = 0
    return table


def one_hot(n: int, criterion: str) -> Tensor:
    return rows(n, **{criterion: 1.0})


def _first_largest(logits: Sequence[float]) -> int:
    return max(range(len(logits)), key=lambda k: (logits[k], -k))


def _largest_probability(logits: Sequence[float]) -> float:
    most = max(logits)
    return 1 / sum(math.exp(x - most) for x in logits)


def _walk(exits: Exits, thresholds: Sequence[float], numbers: Sequence[float], logits: Sequence[list[float]]) -> Taken:
    doubt = math.inf
    for i, limit in enumerate(thresholds):
        doubt = min(doubt, abs(numbers[i] - limit))
        if numbers[i] > limit:
            return Taken(i, logits[i], numbers[i], doubt)
    return Taken(len(exits) - 1, logits[-1], numbers[-1], doubt)


def patience(n: int, most: int) -> RuleCase:
    """PABEE: a sample exits once `most` exits in a row have agreed with the one before them."""
    limits = [most + 0.5] * n

    def oracle(exits: Exits) -> Taken:
        streak, numbers, before = 0, [], None
        for logits, _ in exits:
            best = _first_largest(logits)
            streak = streak + 1 if best == before else 0
            before = best
            numbers.append(streak + 1.0)
        return _walk(exits, limits, numbers, [list(x) for x, _ in exits])

    return RuleCase(rows(n, bias=1, keep_if_same=1), torch.tensor(limits), oracle, exact=True)


def vote(weights: Sequence[float], enough: float) -> RuleCase:
    """BEEM: weighted largest probabilities add up while exits agree."""
    n = len(weights) - 1

    def oracle(exits: Exits) -> Taken:
        total, numbers, before = 0.0, [], None
        for weight, (logits, _) in zip(weights, exits, strict=True):
            best = _first_largest(logits)
            voted = weight * _largest_probability(logits)
            total = total + voted if best == before else voted
            before = best
            numbers.append(total)
        return _walk(exits, [enough] * n, numbers, [list(x) for x, _ in exits])

    return RuleCase(rows(n, max_probability=weights, keep_if_same=1), torch.full((n,), enough), oracle)


def survival(n: int, enough: float) -> RuleCase:
    """NACHOS: 1 - ∏ (1 - c) over the learned confidences so far, in terms of -log(1 - c)."""

    def oracle(exits: Exits) -> Taken:
        doubted, numbers = 1.0, []
        for _, z in exits:
            doubted *= 1 - 1 / (1 + math.exp(-z))
            numbers.append(-math.log(doubted))
        return _walk(exits, [-math.log(1 - enough)] * n, numbers, [list(x) for x, _ in exits])

    return RuleCase(rows(n, softplus=1, keep=1), torch.full((n,), -math.log(1 - enough)), oracle)


def boosted(kept: Sequence[float], enough: float) -> RuleCase:
    """Logits add up from exit to exit, with a weight; the largest probability of the sum decides."""
    n = len(kept) - 1

    def oracle(exits: Exits) -> Taken:
        total: list[float] = []
        sums, numbers = [], []
        for i, (weight, (logits, _)) in enumerate(zip(kept, exits, strict=True)):
            total = [x + weight * y for x, y in zip(logits, total, strict=True)] if i else list(logits)
            sums.append(total)
            numbers.append(_largest_probability(total))
        return _walk(exits, [enough] * n, numbers, sums)

    return RuleCase(rows(n, max_probability=1, logits=kept), torch.full((n,), enough), oracle)


def rule_cases(n: int) -> dict[str, RuleCase]:
    """Every rule with early exits numbered 0 … n - 1."""
    weights = [1.0 + 0.25 * i for i in range(n + 1)]
    return {
        "patience": patience(n, 1), "patient": patience(n, 2), "vote": vote(weights, 1.1),
        "survival": survival(n, 0.8), "boosted": boosted([0.5 + 0.25 * i for i in range(n + 1)], 0.7),
    }  # fmt: skip


def planted(n: int, samples: int, k: int, seed: int = 0) -> Tensor:
    """[n + 1, N, K + 1] float32: random logits and confidence rows; every exit names the class before it half the time,
    and some logits are equal.
    """
    g = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n + 1, samples, k + 1, generator=g)
    outputs[..., :k] = (outputs[..., :k] * 4).round() / 2
    for i in range(1, n + 1):
        again = torch.rand(samples, generator=g) < 0.6
        best = outputs[i - 1, :, :k].argmax(1)
        raised = outputs[i, :, :k].scatter_add(1, best[:, None], torch.full((samples, 1), 9.0))
        outputs[i, :, :k] = raised.where(again[:, None], outputs[i, :, :k])
    return outputs


def exits_of(outputs: Tensor, sample: int) -> Exits:
    return [(x[:-1], x[-1]) for x in outputs[:, sample].tolist()]


def chain(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]], outputs: Tensor, thresholds: Tensor, rule: Tensor | None,
    criterion: str = "carried", poison: float = POISON, seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All exits by an op like `exit_head`, on maps of one pixel whose channels are the outputs, so that no sum rounds.

    thresholds: [n], or [n, N], of each sample. Returns logits, confidence, exits, in the order of the samples, from
    results that were full of `poison`, at places in random order.
    """
    count, samples, width = outputs.shape
    g = torch.Generator().manual_seed(seed)
    places = torch.randperm(samples + 3, generator=g)[:samples].int()
    results = torch.full((samples + 3, width - 1), poison), torch.full((samples + 3,), poison)
    exits = torch.full((samples + 3,), -1)
    of_each = thresholds.new_zeros(count, samples + 3)
    if thresholds.dim() == 2:
        of_each[:-1, places.long()] = thresholds
    live, lists = torch.tensor([samples]).int(), (torch.arange(samples).int(), places)
    weight, bias = torch.eye(width), torch.zeros(width)
    for i in range(count):
        limit = None if i == count - 1 else of_each[i] if thresholds.dim() == 2 else thresholds[i]
        more: tuple[Any, ...] = () if rule is None else (rule[i],)
        *lists, live = run(
            outputs[i, :, :, None, None].contiguous(), weight, bias, limit, *lists, live, criterion, i, *results, exits,
            *more,
        )  # fmt: skip
    assert int(live) == 0
    at = places.long()
    untouched = torch.ones(samples + 3, dtype=torch.bool).index_fill(0, at, False)
    assert (exits[untouched] == -1).all()
    assert torch.equal(results[0][untouched], torch.full_like(results[0], poison)[untouched]) or math.isnan(poison)
    return results[0][at], results[1][at], exits[at]


def check_by_definition(case: RuleCase, outputs: Tensor, answer: tuple[Tensor, Tensor, Tensor]) -> None:
    """Exits as the oracle takes them, samples within rounding of a threshold aside; its logits and its number."""
    logits, confidence, exits = answer
    sure = 0
    for i in range(outputs.shape[1]):
        taken = case.oracle(exits_of(outputs, i))
        if not case.exact and taken.doubt < 1e-5:
            continue
        sure += 1
        assert int(exits[i]) == taken.exit, (i, taken)
        torch.testing.assert_close(logits[i].double(), torch.tensor(taken.logits).double(), rtol=1e-6, atol=1e-6)
        tolerance = 0 if case.exact else 4e-6
        assert abs(float(confidence[i]) - taken.number) <= tolerance * max(1.0, abs(taken.number)), (i, taken)
    assert sure >= outputs.shape[1] * 0.9
    assert len(exits.unique()) > 1 or outputs.shape[2] == 2, "every sample exits at the same exit"
