"""Rules that carry, one image at a time in plain Python by each rule's own definition; outputs whose exits often agree;
a network that says given outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eefast import EarlyExitNet, rules
from eefast.heads import ExitHead

Said = list[tuple[list[float], float]]
"""Of one image: logits and confidence row of every exit."""

Quantities = Iterator[tuple[float, float, float]]
"""Exit by exit: the quantity of the rule's definition, the bound that it must reach, and the number s in the result."""


def agreeing_outputs(n: int, exits: int, classes: int, seed: int = 0) -> Tensor:
    """[N, exits, K + 1] float32 logits and confidence rows; most exits of an image favour its class."""
    r = torch.Generator().manual_seed(seed)
    found = torch.randn(n, exits, classes + 1, generator=r)
    favourite = torch.randint(0, classes, (n, 1, 1), generator=r).expand(n, exits, 1)
    found.scatter_add_(2, favourite, 2.5 * (torch.rand(n, exits, 1, generator=r) < 0.7).float())
    return found


def probabilities(logits: Sequence[float]) -> list[float]:
    powers = [math.exp(x - max(logits)) for x in logits]
    return [p / sum(powers) for p in powers]


def class_of(logits: Sequence[float]) -> int:
    return list(logits).index(max(logits))


def patience(said: Said, wanted: int) -> Quantities:
    """PABEE: a counter of exits that say what the exit before said."""
    counter, before = 0, None
    for logits, _ in said:
        counter = counter + 1 if class_of(logits) == before else 0
        before = class_of(logits)
        yield counter, wanted, counter + 1


def vote(said: Said, weights: Sequence[float], votes: float) -> Quantities:
    """BEEM: the weighted probabilities of the last exits that agree."""
    for i, (logits, _) in enumerate(said):
        run = [i]
        while run[-1] > 0 and class_of(said[run[-1] - 1][0]) == class_of(logits):
            run.append(run[-1] - 1)
        total = sum(weights[j] * max(probabilities(said[j][0])) for j in run)
        yield total, votes, total


def survival(said: Said, probability: float) -> Quantities:
    """NACHOS: one minus the product of what all exits doubt."""
    doubts = [1 - 1 / (1 + math.exp(-z)) for _, z in said]
    for i in range(len(said)):
        product = math.prod(doubts[: i + 1])
        yield 1 - product, probability, -math.log(product)


def carried(said: Said, a: Sequence[float], wanted: float) -> Quantities:
    """Each exit's logits enter with the product of the factors after it."""
    for i in range(len(said)):
        factors = [math.prod(a[j + 1 : i + 1]) for j in range(i + 1)]
        logits = [sum(f * said[j][0][k] for j, f in enumerate(factors)) for k in range(len(said[0][0]))]
        yield max(probabilities(logits)), wanted, max(probabilities(logits))


def fitted(said: Said, weights: Sequence[Sequence[float]], bias: Sequence[float]) -> Quantities:
    """The probability of a logistic regression is above a half."""
    for (logits, z), row, start in zip(said, weights, bias, strict=True):
        p = sorted(probabilities(logits), reverse=True)
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        margin = p[0] - p[1] if len(p) > 1 else p[0]
        numbers = 1 / (1 + math.exp(-z)), p[0], -entropy, margin, math.log(1 + math.exp(z))
        s = start + sum(w * x for w, x in zip(row, numbers, strict=True))
        yield 1 / (1 + math.exp(-s)), 0.5, s


@dataclass(frozen=True)
class RuleCase:
    """A rule, its thresholds, and its oracle."""

    name: str
    rule: rules.Rule
    thresholds: list[float]
    oracle: Callable[[Said], Quantities]
    exact: bool = False


def cases(exits: int) -> list[RuleCase]:
    """Every kind of rule for a number of exits, the last one included."""
    n = exits - 1
    weights, a = [1.0 + 0.1 * i for i in range(exits)], [0.0] + [0.7] * n
    numbers = [[0.5, 1.5 + 0.1 * i, 0.3, 0.7, 0.2] for i in range(exits)]
    bias = [-2.0 + 0.2 * i for i in range(exits)]
    return [
        RuleCase("patience", rules.patience(n), rules.patience_thresholds(1, n), lambda x: patience(x, 1), True),
        RuleCase("vote", rules.vote(weights), rules.vote_thresholds(1.1, n), lambda x: vote(x, weights, 1.1)),
        RuleCase("survival", rules.survival(n), rules.survival_thresholds(0.9, n), lambda x: survival(x, 0.9)),
        RuleCase("carried", rules.carried(a), [0.6] * n, lambda x: carried(x, a, 0.6)),
        RuleCase("fitted", rules.fitted(numbers, bias), [0.0] * n, lambda x: fitted(x, numbers, bias)),
    ]


def check(case: RuleCase, outputs: Tensor, exits: Tensor, confidence: Tensor) -> int:
    """Assert exits [N] and confidence [N] against the oracle; returns how many images were too near to a bound.

    outputs: [N, exits, K + 1].
    """
    near = 0
    for image, taken, s in zip(outputs.tolist(), exits.tolist(), confidence.tolist(), strict=True):
        quantities = list(case.oracle([(row[:-1], row[-1]) for row in image]))
        last = len(quantities) - 1
        wanted = next((i for i, (x, bound, _) in enumerate(quantities) if x >= bound and i < last), last)
        if not case.exact and any(abs(x - bound) < 1e-5 for x, bound, _ in quantities[: wanted + 1]):
            near += 1
            continue
        assert taken == wanted
        assert abs(s - quantities[wanted][2]) <= (0 if case.exact else 2e-5 * max(1.0, abs(s)))
    return near


def random_rule(exits: int, seed: int) -> rules.Rule:
    """Any numbers, of which many are 0."""
    r = np.random.default_rng(seed)
    table = r.normal(size=(exits, 9)) * (r.random((1, 9)) < 0.5) * (r.random((exits, 9)) < 0.8)
    table[:, 6:] *= r.choice([0.5, 1.0], size=(1, 3))
    table[0, 6:] = 0
    return rules.Rule("fitted", tuple(map(tuple, table.tolist())))


def in_float64(outputs: Tensor, rule: rules.Rule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of all exits without thresholds: L [exits, N, K], s [exits, N], and whether s hangs on a tie of classes."""
    found_l, found_s, unclear = [], [], []
    table, said = np.array(rule.rows), outputs.double().numpy()
    for i, (w0, w1, w2, w3, w4, bias, keep, keep_if_same, a) in enumerate(table):
        z, answer = said[:, i, -1], said[:, i, :-1]
        if i and a:
            answer = answer + a * found_l[-1]
        powers = np.exp(answer - answer.max(1, keepdims=True))
        p = powers / powers.sum(1, keepdims=True)
        ordered = np.sort(p, axis=1)
        first = ordered[:, -1]
        margin = first - ordered[:, -2] if p.shape[1] > 1 else first
        minus_entropy = (p * np.log(np.maximum(p, 1e-300))).sum(1)
        s = bias + w0 / (1 + np.exp(-z)) + w1 * first + w2 * minus_entropy + w3 * margin + w4 * np.logaddexp(0, z)
        tie = np.zeros(len(s), bool) if p.shape[1] == 1 else margin < 1e-5
        if i:
            same = answer.argmax(1) == found_l[-1].argmax(1)
            s = s + (keep + keep_if_same * same) * found_s[-1]
            tie = tie | unclear[-1]
        found_l.append(answer)
        found_s.append(s)
        unclear.append(tie)
    return np.stack(found_l), np.stack(found_s), np.stack(unclear)


def check_random(
    outputs: Tensor, rule: rules.Rule, thresholds: Sequence[float], logits: Tensor, confidence: Tensor, exits: Tensor
) -> int:
    """Assert a result against `in_float64`; returns how many images were too near to a threshold or a tie."""
    wanted_l, wanted_s, unclear = in_float64(outputs, rule)
    last, n = len(rule.rows) - 1, len(outputs)
    allowed = 2e-5 * np.maximum(1, np.abs(wanted_s))
    limits = np.float32(thresholds).astype(np.float64)[:, None]
    goes = wanted_s[:-1] > limits
    wanted = np.where(goes.any(0), goes.argmax(0), last)
    near = np.abs(wanted_s[:-1] - limits) < allowed[:-1]
    seen = np.arange(last)[:, None] <= wanted
    doubtful = (near & seen).any(0) | unclear[wanted, np.arange(n)]
    clear = ~doubtful
    assert (exits.numpy() == wanted)[clear].all()
    at = wanted[clear], np.arange(n)[clear]
    assert (np.abs(confidence.numpy()[clear] - wanted_s[at]) <= allowed[at]).all()
    assert np.allclose(logits.numpy()[clear], wanted_l[at], rtol=2e-5, atol=2e-5)
    return int(doubtful.sum())


def speaking_network(exits: int, classes: int, rule: rules.Rule | str, thresholds: Sequence[float]) -> EarlyExitNet:
    """Says at exit i what channels i (K + 1) … of the image hold; every sum in it has one term."""
    channels = exits * (classes + 1)
    shape = channels, 2, 2
    stages, heads = [], []
    for i in range(exits):
        conv = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(conv.weight)
        head = ExitHead("pool", shape, classes, shape)
        for linear, begin, end in ((head.classifier, 0, classes), (head.confidence, classes, classes + 1)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
            for k in range(begin, end):
                linear.weight.data[k - begin, i * (classes + 1) + k] = 1
        stages.append(conv)
        heads.append(head)
    return EarlyExitNet(stages, heads, input_shape=shape, criterion=rule, thresholds=thresholds).eval()


def as_images(outputs: Tensor) -> Tensor:
    """[N, exits, K + 1] → what `speaking_network` says them for."""
    return outputs.flatten(1)[:, :, None, None].expand(-1, -1, 2, 2).contiguous()
