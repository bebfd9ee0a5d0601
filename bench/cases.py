"""A network, images and a cost → a case: thresholds for that cost, batches, what answers to them must be."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from selection import NO_EXITS, OWN_THRESHOLDS
from subjects import Subject
from torch import Tensor

from eefast.criteria import get
from eefast.measure.comparison import judge
from eefast.model import EarlyExitNet
from eefast.result import ExitOutput
from eefast.thresholds.outputs import exits_taken


@dataclass(frozen=True)
class Case:
    """A network ready to be measured at one batch size and one mean cost.

    net: float32, its thresholds giving the cost on the images of `batches`, which are in the measured dtype.
    outputs: what its exits say about them in float32, on the CPU.
    setting: "no exits", "cost 0.25" or "own thresholds"; empty where a network has only one.
    mix: share of the images per exit.
    """

    net: EarlyExitNet
    batches: Sequence[Tensor]
    outputs: list[ExitOutput]
    setting: str = ""
    mix: tuple[float, ...] = ()


@dataclass(frozen=True)
class Checked:
    """Answers found to be right.

    costs: mean cost of each batch; exits: number of images at each exit; flips, other_answers: as in `NetworkRow`.
    """

    costs: tuple[float, ...]
    exits: tuple[int, ...]
    flips: int
    other_answers: int


def setting_of(cost: float | None, mix: Sequence[float] = ()) -> str:
    """cost: asked for, 1: no image exits early; None: own thresholds, or those for the only `mix` of the network."""
    if cost is None:
        return "" if mix else OWN_THRESHOLDS
    return NO_EXITS if cost >= 1 else f"cost {cost:g}"


@torch.no_grad()
def make_case(
    subject: Subject,
    batch_size: int,
    cost: float | None,
    most: int | None = None,
    *,
    mix: Sequence[float] = (),
    whole_batch: str | None = None,
) -> Case:
    """Thresholds for a mean cost over all images; the first `most` batches are measured and checked, None: all.

    cost: as in `setting_of`; mix: share of the images per exit, by default one of this cost.
    whole_batch: as `Peer.whole_batch`; at each exit as many images are sure as would exit there one by one.
    """
    net, outputs, criterion = subject.net, subject.outputs, subject.net.criterion.name
    setting = setting_of(cost, mix)
    if setting == OWN_THRESHOLDS:
        taken = exits_taken(outputs, net.criterion, net.thresholds.cpu())
        mix = [round(share, 4) for share in (taken.bincount(minlength=net.num_exits + 1) / len(taken)).tolist()]
    elif cost is not None and not mix:
        mix = mix_of_cost(net.cost.tolist(), cost)
    if whole_batch is not None:
        # What is compared with the thresholds takes the place of the learned confidence.
        criterion, outputs = "learned", [_with_confidence(out, _confidence(out, whole_batch)) for out in outputs]
        net = net.with_criterion(criterion)
    net = copy.deepcopy(net).eval()
    if setting != OWN_THRESHOLDS or whole_batch is not None:
        net.thresholds.copy_(torch.tensor(thresholds(outputs, mix, criterion)))
    batches = subject.images.split(batch_size)[:most]
    outputs = [ExitOutput(*(part[: sum(map(len, batches))] for part in out)) for out in outputs]
    if whole_batch is not None:
        outputs = [_with_confidence(out, _least(out.confidence, batch_size)) for out in outputs]
    return Case(net, batches, outputs, setting, tuple(mix))


def _confidence(out: ExitOutput, criterion: str) -> Tensor:
    return get(criterion).confidence(out.logits, out.confidence_logit)


def _least(confidence: Tensor, batch_size: int) -> Tensor:
    """Every image as unsure as the least sure one of its batch."""
    return torch.cat([part.min().expand(len(part)) for part in confidence.split(batch_size)])


def _with_confidence(out: ExitOutput, confidence: Tensor) -> ExitOutput:
    return ExitOutput(out.logits, confidence, confidence.logit())


def thresholds(outputs: list[ExitOutput], mix: Sequence[float], criterion: str = "learned") -> list[float]:
    """Exit by exit, half-way between two confidences, the one at which its share of all images exits there.

    An infinity, at which no sample exits, where the share is 0 or only one image arrives.
    """
    rule = get(criterion)
    # An image that exits below a threshold exits above it with the signs turned.
    sign = 1.0 if rule.comparison == ">" else -1.0
    live = torch.ones(len(outputs[0].confidence), dtype=torch.bool)
    found: list[float] = []
    for out, share in zip(outputs, mix[:-1], strict=False):
        learned = rule.name == "learned"
        confidence = sign * (out.confidence if learned else rule.confidence(out.logits, out.confidence_logit))
        order = confidence[live].sort(descending=True).values
        if share == 0 or len(order) < 2:
            found.append(sign * float("inf"))
            continue
        leaving = min(max(round(share * len(live)), 1), len(order) - 1)
        limit = float(order[leaving - 1 : leaving + 1].mean())
        found.append(sign * limit)
        live &= confidence <= limit
    return found


def mix_of_cost(cost: Sequence[float], wanted: float) -> tuple[float, ...]:
    """Share of the images per exit that costs `wanted` in the mean, or as near to it as exits of these costs allow.

    The same part of those that arrive exits at every early exit.
    """

    def mix(leaving: float) -> tuple[float, ...]:
        arriving = [(1 - leaving) ** i for i in range(len(cost))]
        return (*(leaving * share for share in arriving[:-1]), arriving[-1])

    low, high = 0.0, 1.0
    if wanted >= 1:
        return mix(low)
    for _ in range(40):
        middle = (low + high) / 2
        above = sum(share * c for share, c in zip(mix(middle), cost, strict=True)) > wanted
        low, high = (middle, high) if above else (low, middle)
    return mix(high)


def joined(answers: Iterable[Any], static: bool) -> tuple[Tensor, Tensor | None]:
    """Answers to all batches, each read before the next one is made: logits in float32 and exits, on the CPU.

    answers: `ExitResult`s, or where `static` logits, which have no exits.
    """
    if static:
        return torch.cat([logits.float().cpu() for logits in answers]), None
    parts = [(answer.logits.float().cpu(), answer.exit_index.cpu()) for answer in answers]
    logits, exits = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(exits)


def check(case: Case, logits: Tensor, exits: Tensor | None, dtype: torch.dtype) -> tuple[Checked | None, str]:
    """What answers cost, or None and what is wrong with them.

    logits, exits: of all batches, as `joined` gives them; without exits every image was to take the final one. dtype:
    of the arithmetic.
    """
    net = case.net
    taken = torch.full((len(logits),), net.num_exits) if exits is None else exits
    whole = [sum(map(len, case.batches[:k])) for k in range(1, len(case.batches) + 1)]
    if len(logits) not in whole:
        return None, f"WRONG: {len(logits)} answers for batches of {[len(batch) for batch in case.batches]} images"
    flips, problem = judge(None if exits is None else net, case.outputs, logits, taken, dtype)
    if problem:
        return None, f"WRONG: {problem}"
    costs = [float(net.cost.cpu()[part].mean()) for part in taken.split(len(case.batches[0]))]
    asked = taken if exits is None else exits_taken(case.outputs, net.criterion, net.thresholds.cpu())[: len(taken)]
    float32 = torch.stack([out.logits[: len(taken)] for out in case.outputs])[asked, torch.arange(len(taken))]
    other = int((logits.argmax(1) != float32.argmax(1)).sum())
    return Checked(tuple(costs), tuple(taken.bincount(minlength=net.num_exits + 1).tolist()), flips, other), ""
