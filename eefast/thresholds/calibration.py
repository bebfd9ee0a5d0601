"""Cached outputs of all exits on held-out data → thresholds under a floor of accuracy or a ceiling of cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, combinations, product
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import criteria
from ..model import EarlyExitNet
from ..modules.copies import mode
from ..result import ExitOutput
from ..system import files

# Steps that may be taken to try all combinations of cuts: about a second on two cores.
EVERYTHING = 8_000_000
# Searches anew from near the answer, each about a tenth of a second per 5,000 samples and five exits.
KICKS = 10
PARTS = ExitOutput._fields
THRESHOLDS_FILE = "thresholds.json"


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
    device = next(net.parameters()).device
    seen: list[list[ExitOutput]] = [[] for _ in net.heads]
    labels = [torch.empty(0, dtype=torch.int64)]
    with mode(net, training=False):
        for images, target in batches:
            for column, out in zip(seen, net.all_exits(net.prepare(images.to(device))), strict=True):
                column.append(ExitOutput(*(part.float().cpu() for part in out)))
            labels.append(target.cpu())
    if not seen[0]:
        raise ValueError("batches is empty; thresholds need held-out data")
    return [ExitOutput(*(torch.cat(part) for part in zip(*column, strict=True))) for column in seen], torch.cat(labels)


def save_outputs(path: str | Path, outputs: Sequence[ExitOutput], labels: Tensor, made_of: Mapping[str, str]) -> None:
    """Write what `collect` found to a safetensors file, so that the next budget costs no pass through the network.

    made_of: what it was collected from, in words; `load_outputs` asks for the same again.
    """
    from safetensors.torch import save

    tensors = {f"exit{i}.{part}": getattr(out, part) for i, out in enumerate(outputs) for part in PARTS}
    files.write(path, save({"labels": labels, **{k: v.contiguous() for k, v in tensors.items()}}, dict(made_of)))


def load_outputs(path: str | Path, made_of: Mapping[str, str]) -> tuple[list[ExitOutput], Tensor]:
    """What `save_outputs` wrote; `ValueError` if it is damaged or was collected from something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            found, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        exits = range((len(tensors) - 1) // len(PARTS))
        outputs = [ExitOutput(*(tensors[f"exit{i}.{part}"] for part in PARTS)) for i in exits]
        labels = tensors["labels"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is no whole file of cached outputs ({error}); delete it or name another") from error
    for key in sorted(made_of.keys() | found.keys()):
        if made_of.get(key) != found.get(key):
            raise ValueError(
                f"{path} was collected with {key}={found.get(key)}, not {made_of.get(key)}; delete it or name another"
            )
    return outputs, labels


def fingerprint(net: EarlyExitNet) -> str:
    """A hash of the network's weights, whatever its thresholds: what its cached outputs were made of."""
    state = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        if name != "thresholds":
            state.update(name.encode())
            state.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def save_thresholds(net: EarlyExitNet, folder: str | Path, chosen: Mapping[str, Calibration]) -> EarlyExitNet:
    """Write the network with its new thresholds to `folder`, and those of all criteria in `chosen` to thresholds.json.

    The network keeps its criterion where that is among `chosen`, else it takes the first one there. What the folder
    holds is replaced as a whole, or not at all. Raises as `EarlyExitNet.save` does.
    """
    name = net.criterion.name if net.criterion.name in chosen else next(iter(chosen))
    thresholds = chosen[name].thresholds
    net = net if name == net.criterion.name else net.with_criterion(name)
    net.thresholds.copy_(torch.tensor(thresholds))
    found = {name: list(c.thresholds) for name, c in chosen.items()}
    with files.together():
        net.save(folder)
        files.write(Path(folder) / THRESHOLDS_FILE, json.dumps(found, indent=2) + "\n")
    return net


def least_images(max_accuracy_drop: float | None = None) -> int:
    """How many samples thresholds should at least be chosen on.

    100, of which one is a hundredth of the accuracy; with a bound on its drop so many that one sample is no more than
    that drop: 200 for 0.005. Drops below 0.001 ask for 1,000.
    """
    return 100 if max_accuracy_drop is None else max(100, ceil(1 / max(max_accuracy_drop, 0.001)))


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
    cost: [n + 1], `EarlyExitNet.cost` or `path_cost`.
    criterion: name in `eefast.criteria`.
    min_accuracy, max_cost: exactly one of them, 0 … 1.

    What is guaranteed: a threshold matters only by whom it lets go, so every exit has at most N + 1 distinguishable
    cuts. With few combinations of them (one early exit: always; two: up to 2,800 samples; three: 190; four: 40) all are
    tried and the answer is the optimum. Beyond that the bound still holds, and the answer is a local optimum: no change
    of one threshold improves it, nor does one of two at a time among about 150 cuts of each. The search starts from the
    optima without the bound at many prices of cost (`pareto_front`), and with fewer than 50,000 samples again from
    random changes of its answer, the same ones each time. 50,000 samples and eight exits take some 5 s on two cores.
    A threshold stands half-way between two confidences that occurred, so none of them ties with it.
    Raises `ValueError` if nothing found keeps the bound, with the nearest that was found.
    """
    if (min_accuracy is None) == (max_cost is None):
        raise ValueError(f"min_accuracy={min_accuracy}, max_cost={max_cost}: give exactly one of them")
    cuts = _Cuts(outputs, labels, cost, criterion)
    n = len(labels)

    def excess(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        return mean_cost - max_cost if max_cost is not None else min_accuracy - accuracy

    def within_bound(totals: Tensor) -> Tensor:
        accuracy, mean_cost = totals / n
        # Among equals the cheaper, or the more accurate: less than 1 / n tells no accuracies apart.
        gain = accuracy - mean_cost / (4 * n) if max_cost is not None else 1e-9 * accuracy - mean_cost
        # Both lie within a few units of 0, so everything feasible is above everything infeasible.
        return gain.where(excess(totals) <= 1e-12, -100 - excess(totals))

    totals, front = cuts.front()
    at = int(within_bound(totals).argmax())
    best = front[at]
    if not cuts.few:
        # The optima without the bound next to it, on both sides, are where those within it are to be sought.
        for start in [*front[max(at - 1, 0) : at + 2], *[None] * min(KICKS, 49_999 // n)]:
            found = cuts.search(within_bound, cuts.kicked(best) if start is None else start, pairs=True)
            best = max(best, found, key=lambda picks: float(within_bound(cuts.totals(picks))))
    totals = cuts.totals(best)
    chosen = cuts.calibration(best, totals)
    # Looser than the search, whose running sums end in other last bits than the sum over all.
    if not float(excess(totals)) <= 1e-9:
        bound = f"min_accuracy={min_accuracy}" if min_accuracy is not None else f"max_cost={max_cost}"
        raise ValueError(
            f"{bound} cannot be kept; the nearest is accuracy {chosen.accuracy:.4f} at mean cost {chosen.cost:.4f}"
        )
    return chosen


def pareto_front(
    outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str = "learned"
) -> tuple[Calibration, ...]:
    """Thresholds of which none is both cheaper and at least as accurate as another, from cheap to accurate.

    Arguments as `calibrate`. Where that is exact this is the whole front; beyond, its convex hull, as far as a search
    that changes one threshold at a time finds it: optima of accuracy - price × mean cost for many prices.
    """
    cuts = _Cuts(outputs, labels, cost, criterion)
    totals, front = cuts.front()
    return tuple(map(cuts.calibration, front, totals.T))


@dataclass(frozen=True)
class Scaling:
    """One temperature per exit for its logits, one line per exit for its confidence row; n + 1 numbers each.

    Logits become logits / temperature (Guo et al. 2017), the confidence row z becomes slope · z + offset (Platt 1999).
    No exit's label changes. What changes for the criteria:
    max_probability, margin, entropy: their values, and with three or more classes the order of the samples, so other
        samples leave at an equal cost.
    learned: its values only; while the slope is positive the order stays, and calibrated thresholds let the same
        samples go. A negative slope says that the row was right about what is wrong.
    """

    temperature: tuple[float, ...]
    slope: tuple[float, ...]
    offset: tuple[float, ...]


def fit_scaling(outputs: Sequence[ExitOutput], labels: Tensor) -> Scaling:
    """The scaling with the least negative log-likelihood on held-out data, exit by exit, by LBFGS in float64.

    The learned confidence is fitted to "this exit is right", with Platt's targets (n + 1) / (n + 2) instead of 1 and
    1 / (n + 2) instead of 0, which keep the line finite where the row tells right from wrong without a mistake.
    Temperatures are held within 0.05 … 20. Raises `ValueError` for no samples, and for outputs that are no numbers.
    """
    temperature, lines = [], []
    for i, out in enumerate(outputs):
        logits, row = out.logits.double(), out.confidence_logit.double()
        if len(labels) == 0 or not (logits.isfinite().all() and row.isfinite().all()):
            raise ValueError(
                f"exit {i} has {len(labels)} samples, or outputs that are no numbers; nothing can be fitted"
            )
        right = logits.argmax(dim=1) == labels
        target = torch.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)).double()

        def nll(p: Tensor, logits: Tensor = logits) -> Tensor:
            return nn.functional.cross_entropy(logits / _temperature(p), labels)

        def line_nll(p: Tensor, row: Tensor = row, target: Tensor = target) -> Tensor:
            return nn.functional.binary_cross_entropy_with_logits(p[0] * row + p[1], target)

        temperature.append(float(_temperature(_least(nll, [0.0]))))
        lines.append(_least(line_nll, [1.0, 0.0]).tolist())
    slope, offset = zip(*lines, strict=True)
    return Scaling(tuple(temperature), slope, offset)


def scaled(outputs: Sequence[ExitOutput], scaling: Scaling) -> list[ExitOutput]:
    """The outputs that the network would give with `scaling` folded into its heads."""
    parts = zip(outputs, scaling.temperature, scaling.slope, scaling.offset, strict=True)
    return [
        ExitOutput(out.logits / t, torch.sigmoid(a * out.confidence_logit + b), a * out.confidence_logit + b)
        for out, t, a, b in parts
    ]


@torch.no_grad()
def fold_scaling(net: EarlyExitNet, scaling: Scaling) -> None:
    """Change the linear layers of the network's heads in place, so that it answers as `scaled` says, at no cost.

    Raises `ValueError` before anything is changed for heads without linear layers `classifier` and `confidence`.
    """
    for (classifier, confidence), t, a, b in zip(
        scalable_layers(net), scaling.temperature, scaling.slope, scaling.offset, strict=True
    ):
        for parameter in (classifier.weight, classifier.bias):
            parameter.div_(t)
        confidence.weight.mul_(a)
        confidence.bias.mul_(a).add_(b)


def scalable_layers(net: EarlyExitNet) -> list[list[Any]]:
    """Classifier and confidence of every head; `ValueError` unless all are linear layers with biases."""
    layers: list[list[Any]] = [
        [getattr(head, name, None) for name in ("classifier", "confidence")] for head in net.heads
    ]
    for i, pair in enumerate(layers):
        if not all(isinstance(layer, nn.Linear) and layer.bias is not None for layer in pair):
            raise ValueError(f"head {i} has no linear layers classifier and confidence with biases to fold into")
    return layers


def _temperature(p: Tensor) -> Tensor:
    return (3 * torch.tanh(p / 3)).exp()


def _least(loss: Callable[[Tensor], Tensor], start: Sequence[float]) -> Tensor:
    point = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([point], max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(point)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[arg-type]
    return point.detach()


class _Cuts:
    """For every early exit its cuts: the 0 … N most confident samples leave, where a threshold can tell them apart.

    `picks` holds one index of a cut per early exit. Totals are [2, …] float64: right answers and cost of all samples.
    """

    def __init__(self, outputs: Sequence[ExitOutput], labels: Tensor, cost: Tensor, criterion: str) -> None:
        if len(labels) == 0 or len(outputs) < 2:
            raise ValueError(
                f"{len(labels)} samples, {len(outputs) - 1} early exits: thresholds need at least one of both"
            )
        rule = criteria.get(criterion)
        self.criterion, self.num_exits, self.num_samples = criterion, len(outputs) - 1, len(labels)
        self.random = torch.Generator().manual_seed(0)
        right = torch.stack([out.logits.argmax(dim=1) == labels for out in outputs]).double()
        self.outcome = torch.stack([right, cost.double().cpu()[:, None].expand_as(right)], dim=1)
        self.order, self.rank, self.leavers, self.thresholds = [], [], [], []
        sign = 1.0 if rule.comparison == ">" else -1.0
        for out in outputs[:-1]:
            score = rule.confidence(out.logits, out.confidence_logit) * sign
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
            self.thresholds.append(edges[apart] * sign)

    @property
    def few(self) -> bool:
        """Whether all combinations of cuts are tried."""
        *others, _, _ = sizes = [1, *map(len, self.leavers)]
        # Every combination of the others takes a table of the last two, and its own passes over the samples.
        return prod(sizes) + prod(others) * (self.num_samples + 2000) <= EVERYTHING or self.num_exits == 1

    def calibration(self, picks: Sequence[int], totals: Tensor) -> Calibration:
        accuracy, mean_cost = (totals / self.num_samples).tolist()
        thresholds = (float(values[pick]) for values, pick in zip(self.thresholds, picks, strict=True))
        return Calibration(self.criterion, tuple(thresholds), accuracy, mean_cost)

    def leaves(self, picks: Sequence[int], i: int) -> Tensor:
        return self.rank[i] < self.leavers[i][picks[i]]

    def later(self, picks: Sequence[int], i: int) -> Tensor:
        """[2, N] outcome of every sample if it does not leave before exit i."""
        value = self.outcome[-1]
        for k in reversed(range(i, self.num_exits)):
            value = self.outcome[k].where(self.leaves(picks, k), value)
        return value

    def totals(self, picks: Sequence[int]) -> Tensor:
        return self.later(picks, 0).sum(dim=1)

    def line(self, i: int, arrives: Tensor, later: Tensor) -> Tensor:
        """[2, cuts] what the samples that arrive add up to for every cut of exit i."""
        # Not by indexing, which takes five times as long.
        gained = ((self.outcome[i] - later) * arrives).gather(1, self.order[i].expand(2, -1)).cumsum(dim=1)
        return (later * arrives).sum(dim=1, keepdim=True) + nn.functional.pad(gained, (1, 0))[:, self.leavers[i]]

    def grid(self, picks: Sequence[int], i: int, j: int, columns: tuple[Tensor, Tensor]) -> Tensor:
        """Totals [2, a, b] for all pairs of a cuts of exit i and b of exit j > i, all other exits cut as in `picks`.

        columns: which cuts, ascending. A sample that leaves at cut a of exit i does so at every later one; so
        two-dimensional running sums of its gains count it wherever it leaves.
        """
        before = torch.zeros(self.num_samples, dtype=torch.bool)
        for k in range(i):
            before |= self.leaves(picks, k)
        between = torch.zeros_like(before)
        late = self.later(picks, j + 1)
        stays = late
        for k in reversed(range(i + 1, j)):
            leaves = self.leaves(picks, k)
            between |= leaves
            stays = self.outcome[k].where(leaves, stays)
        # The sample's first cut of both exits, among `columns`, at which it leaves; one past the end if at none.
        first = [
            torch.bucketize(self.rank[e], self.leavers[e][c], right=True) for e, c in zip((i, j), columns, strict=True)
        ]
        sizes = [len(c) + 1 for c in columns]
        arrives, reaches = ~before, ~(before | between)
        cell = first[0] * sizes[1] + first[1]
        base = self.later(picks, 0).where(before, stays).sum(dim=1)
        tables = []
        for row in range(2):
            at_i = torch.bincount(first[0], (self.outcome[i, row] - stays[row]) * arrives, sizes[0]).cumsum(0)
            at_j = torch.bincount(cell, (self.outcome[j, row] - late[row]) * reaches, sizes[0] * sizes[1])
            at_j = at_j.view(*sizes).cumsum(1)
            # Of those who would leave at j, the ones that already left at i do not.
            tables.append(base[row] + at_i[:, None] + at_j.sum(0) - at_j.cumsum(0))
        return torch.stack(tables)[:, :-1, :-1]

    def search(self, objective: Callable[[Tensor], Tensor], picks: Sequence[int], pairs: bool = False) -> list[int]:
        """Cuts at which no exit alone raises `objective`; with `pairs` no two exits either, as far as `near` tries."""
        picks, best = list(picks), float(objective(self.totals(picks)))
        while True:
            before = best
            best = self._one_by_one(objective, picks, best)
            if pairs and not best > before + 1e-12:
                best = self._two_by_two(objective, picks, best)
            if not best > before + 1e-12:
                return picks

    def _one_by_one(self, objective: Callable[[Tensor], Tensor], picks: list[int], best: float) -> float:
        arrives, gone = [torch.ones(self.num_samples, dtype=torch.bool)], [torch.zeros(2, 1, dtype=torch.float64)]
        for i in range(self.num_exits - 1):
            leaves = self.leaves(picks, i) & arrives[i]
            gone.append(gone[i] + (self.outcome[i] * leaves).sum(dim=1, keepdim=True))
            arrives.append(arrives[i] & ~leaves)
        later = self.outcome[-1]
        for i in reversed(range(self.num_exits)):
            value, pick = objective(gone[i] + self.line(i, arrives[i], later)).max(dim=0)
            if value > best:
                picks[i], best = int(pick), float(value)
            later = self.outcome[i].where(self.leaves(picks, i), later)
        return best

    def _two_by_two(self, objective: Callable[[Tensor], Tensor], picks: list[int], best: float) -> float:
        for i, j in combinations(range(self.num_exits), 2):
            columns = self.near(i, picks[i]), self.near(j, picks[j])
            values = objective(self.grid(picks, i, j, columns))
            if values.max() > best:
                a, b = divmod(int(values.argmax()), len(columns[1]))
                picks[i], picks[j], best = int(columns[0][a]), int(columns[1][b]), float(values.max())
        return best

    def kicked(self, picks: Sequence[int]) -> list[int]:
        """The cuts of two exits moved at random, by up to an eighth of all that there are."""
        kicked = list(picks)
        for i in torch.randperm(self.num_exits, generator=self.random)[:2].tolist():
            last = len(self.leavers[i]) - 1
            step = int(torch.randint(-last // 8, last // 8 + 1, (1,), generator=self.random))
            kicked[i] = min(max(picks[i] + step, 0), last)
        return kicked

    def near(self, i: int, pick: int) -> Tensor:
        """Cuts of exit i worth trying together with another exit's: evenly spread ones, and denser towards `pick`."""
        last = len(self.leavers[i]) - 1
        steps = torch.logspace(0, 5, 40).long()
        return torch.cat([torch.linspace(0, last, 96).long(), pick - steps, pick + steps]).clamp(0, last).unique()

    def front(self) -> tuple[Tensor, list[list[int]]]:
        """Totals [2, M] and cuts from cheap to accurate, none worse in both; all there are where `few`."""
        found = sorted(self._every_best() if self.few else self._priced(), key=lambda point: (point[1], -point[0]))
        most = list(accumulate((right for right, _, _ in found), max, initial=-1.0))
        front = [point for point, before in zip(found, most, strict=False) if point[0] > before + 0.5]
        return torch.tensor([point[:2] for point in front], dtype=torch.float64).T, [point[2] for point in front]

    def _priced(self) -> Iterator[tuple[float, float, list[int]]]:
        """Optima of accuracy - price × cost, from "accuracy is all" to "cost is all" and back."""
        prices = [0.0, *torch.logspace(-4, 1, 26).tolist()]
        for picks, path in (
            ([0] * self.num_exits, prices),
            ([len(leavers) - 1 for leavers in self.leavers], reversed(prices)),
        ):
            for price in path:

                def gain(totals: Tensor, price: float = price) -> Tensor:
                    return totals[0] - price * totals[1]

                picks = self.search(gain, picks)
                right, cost = self.totals(picks).tolist()
                yield right, cost, picks

    def _every_best(self) -> Iterator[tuple[float, float, list[int]]]:
        """For every number of right answers the cheapest cuts among all."""
        cheapest = torch.full((self.num_samples + 1,), torch.inf, dtype=torch.float64)
        best: list[list[int]] = [[] for _ in cheapest]
        last = len(self.leavers[-1])
        for others in product(*(range(len(leavers)) for leavers in self.leavers[:-2])):
            right, cost = self._every_pair(others).flatten(1)
            right = right.round().long()
            least = torch.full_like(cheapest, torch.inf).scatter_reduce(0, right, cost, "amin")
            cell = torch.empty_like(cheapest, dtype=torch.int64)
            chosen = (cost == least[right]).nonzero().flatten()
            cell[right[chosen]] = chosen
            for r in (least < cheapest - 1e-9).nonzero().flatten().tolist():
                cheapest[r] = least[r]
                best[r] = [*others, *divmod(int(cell[r]), last)][-self.num_exits :]
        yield from ((float(r), float(cheapest[r]), picks) for r, picks in enumerate(best) if picks)

    def _every_pair(self, others: Sequence[int]) -> Tensor:
        """Totals for all cuts of the last two exits, or of the only one."""
        if self.num_exits == 1:
            return self.line(0, torch.ones(self.num_samples, dtype=torch.bool), self.outcome[-1])
        i, j = self.num_exits - 2, self.num_exits - 1
        columns = torch.arange(len(self.leavers[i])), torch.arange(len(self.leavers[j]))
        return self.grid([*others, 0, 0], i, j, columns)
