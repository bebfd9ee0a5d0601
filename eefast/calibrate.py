"""Cached outputs of all exits on held-out data → thresholds under a floor of accuracy or a ceiling of cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import criteria
from .model import EarlyExitNet
from .result import ExitOutput


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they do on the data that they were chosen on.

    criterion: name in `eefast.criteria`.
    thresholds: one per early exit.
    accuracy, cost: share of right answers and mean cost, both 0 … 1.
    """

    criterion: str
    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


@torch.no_grad()
def collect(net: EarlyExitNet, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[list[ExitOutput], Tensor]:
    """Outputs of every exit for every sample, on the CPU in float32, and the labels [N] int64.

    batches: (images as the network takes them, labels [N]); the network runs in eval mode and is left as it was.
    """
    device, training = next(net.parameters()).device, net.training
    net.eval()
    seen: list[list[ExitOutput]] = [[] for _ in net.heads]
    labels = [torch.empty(0, dtype=torch.int64)]
    try:
        for images, target in batches:
            for column, out in zip(seen, net.all_exits(net.prepare(images.to(device))), strict=True):
                column.append(ExitOutput(*(part.float().cpu() for part in out)))
            labels.append(target.cpu())
    finally:
        net.train(training)
    if not seen[0]:
        raise ValueError("batches is empty; thresholds need held-out data")
    return [ExitOutput(*(torch.cat(part) for part in zip(*column, strict=True))) for column in seen], torch.cat(labels)


def exits_taken(
    outputs: Sequence[ExitOutput], criterion: criteria.Criterion, thresholds: Sequence[float] | Tensor
) -> Tensor:
    """First exit that each sample leaves at, [N] int64, by n thresholds on what n + 1 exits say about all samples."""
    taken = torch.full((len(outputs[0].logits),), len(outputs) - 1)
    for i in reversed(range(len(outputs) - 1)):
        confidence = criterion.confidence(outputs[i].logits, outputs[i].confidence_logit)
        taken[criterion.leaves(confidence, torch.as_tensor(thresholds[i], dtype=torch.float32))] = i
    return taken


def outcome(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str, thresholds: Sequence[float]
) -> tuple[float, float]:
    """Accuracy and mean cost that `thresholds` (n numbers) give on outputs of n + 1 exits; `cost` is [n + 1]."""
    taken = exits_taken(outputs, criteria.get(criterion), thresholds)
    answers = torch.stack([out.logits.argmax(dim=1) for out in outputs]).gather(0, taken[None])[0]
    return (answers == labels).double().mean().item(), cost.double().cpu()[taken].mean().item()


def calibrate(
    outputs: Sequence[ExitOutput],
    labels: Tensor,
    cost: Tensor,
    criterion: str = "learned",
    *,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
) -> Calibration:
    """The cheapest thresholds with at least `min_accuracy`, or the most accurate ones with at most `max_cost`.

    outputs, labels: of n + 1 exits on held-out data, see `collect`.
    cost: [n + 1], see `EarlyExitNet.cost`.
    criterion: name in `eefast.criteria`.
    min_accuracy, max_cost: exactly one of them, 0 … 1.

    Coordinate search: with all other thresholds fixed, every cut of one exit is tried exactly, round after round; first
    without the bound for many prices of cost, then within the bound from the best of those. A threshold stands half-way
    between two confidences that occurred, so none of them ties with it.
    Raises `ValueError` if nothing found keeps the bound, with the nearest that was found.
    """
    if (min_accuracy is None) == (max_cost is None):
        raise ValueError(f"min_accuracy={min_accuracy}, max_cost={max_cost}: give exactly one of them")
    if len(labels) == 0 or len(outputs) < 2:
        raise ValueError(f"{len(labels)} samples, {len(outputs) - 1} early exits: thresholds need at least one of both")
    curves = _Curves(outputs, labels, cost, criteria.get(criterion))

    def within_bound(accuracy: Tensor, mean_cost: Tensor) -> Tensor:
        if min_accuracy is not None:
            excess, gain = min_accuracy - accuracy, -mean_cost
        else:
            assert max_cost is not None
            excess, gain = mean_cost - max_cost, accuracy
        # Both lie within ±1, so everything feasible is above everything infeasible.
        return gain.where(excess <= 1e-12, -10 - excess)

    def priced(price: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda accuracy, mean_cost: accuracy - price * mean_cost

    # From "accuracy is all" to "cost is all".
    prices = (0.0, *torch.logspace(-4, 1, 41).tolist())
    starts = [curves.search(priced(price), [0] * curves.num_exits) for price in prices]
    best = max(starts, key=lambda picks: float(within_bound(*curves.point(picks))))
    best = curves.search(within_bound, best)
    accuracy, mean_cost = (float(value) for value in curves.point(best))
    if float(within_bound(*curves.point(best))) < -5:
        bound = f"min_accuracy={min_accuracy}" if min_accuracy is not None else f"max_cost={max_cost}"
        raise ValueError(f"{bound} cannot be kept; the nearest is accuracy {accuracy:.4f} at mean cost {mean_cost:.4f}")
    return Calibration(criterion, curves.thresholds(best), accuracy, mean_cost)


class _Curves:
    """For every early exit its cuts: the 0 … N most confident samples leave, where a threshold can tell them apart.

    `picks` holds one index of a cut per early exit.
    """

    def __init__(
        self, outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: criteria.Criterion
    ) -> None:
        self.num_exits, self.cost = len(outputs) - 1, cost.double().cpu()
        self.right = torch.stack([out.logits.argmax(dim=1) == labels for out in outputs]).double()
        self.sign = 1.0 if criterion.comparison == ">" else -1.0
        self.order, self.rank, self.leavers, self.cuts = [], [], [], []
        for out in outputs[:-1]:
            score = criterion.confidence(out.logits, out.confidence_logit) * self.sign
            score = score.masked_fill(score.isnan(), -torch.inf)
            score, order = score.sort(descending=True, stable=True)
            seen = score[score > -torch.inf]
            if len(seen) == 0:
                raise ValueError("an early exit has no confidence that is a number; was the network trained?")
            # Outside all confidences by 1, which leaves finite numbers for "nobody" and "everybody".
            edges = torch.cat([seen[:1] + 1, (seen[:-1] + seen[1:]) / 2, seen[-1:] - 1])
            apart = torch.ones(len(edges), dtype=torch.bool)
            apart[1:-1] = (seen[:-1] > edges[1:-1]) & (edges[1:-1] > seen[1:])
            self.order.append(order)
            self.rank.append(order.argsort())
            self.leavers.append(apart.nonzero().flatten())
            self.cuts.append(edges[apart] * self.sign)

    def thresholds(self, picks: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(cuts[pick]) for cuts, pick in zip(self.cuts, picks, strict=True))

    def line(self, picks: Sequence[int], exit_index: int) -> tuple[Tensor, Tensor]:
        """Accuracy and mean cost for every cut of one exit, all other exits cut as in `picks`."""
        n = self.right.shape[1]
        taken = torch.full((n,), self.num_exits)
        for i in reversed(range(self.num_exits)):
            if i != exit_index:
                taken[self.rank[i] < self.leavers[i][picks[i]]] = i
        right, cost = self.right.gather(0, taken[None])[0], self.cost[taken]
        arrives = taken > exit_index
        gained = torch.stack([self.right[exit_index] - right, self.cost[exit_index] - cost]) * arrives
        running = torch.nn.functional.pad(gained[:, self.order[exit_index]].cumsum(dim=1), (1, 0))
        passed = torch.stack([right, cost]).sum(dim=1, keepdim=True)
        accuracy, mean_cost = (passed + running[:, self.leavers[exit_index]]) / n
        return accuracy, mean_cost

    def point(self, picks: Sequence[int]) -> tuple[Tensor, Tensor]:
        accuracy, mean_cost = self.line(picks, 0)
        return accuracy[picks[0]], mean_cost[picks[0]]

    def search(self, objective: Callable[[Tensor, Tensor], Tensor], picks: Sequence[int]) -> list[int]:
        """The cuts at which no exit can raise `objective` alone."""
        picks, best = list(picks), objective(*self.point(picks))
        while True:
            before = best
            for i in reversed(range(self.num_exits)):
                values = objective(*self.line(picks, i))
                if values.max() > best:
                    picks[i], best = int(values.argmax()), values.max()
            if best <= before + 1e-12:
                return picks
